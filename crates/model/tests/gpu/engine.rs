//! Continuous batching on a GPU: requests that share passes and the cache's blocks against each of them alone.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_model::{
    BLOCK_SIZE, Backend, Batch, Config, Cuda, Engine, Event, Finish, Forward, GivenRouting, Limits, Model, Observer,
    Request, RequestId, Result, Segment, TopkIds, blocks_for,
};

use crate::{
    routing::{could_be_chosen, could_be_taken, selection_bias},
    support::{golden, load, on_gpu},
};

/// What the two likeliest tokens must differ by for the choice to be more than rounding.
const CLEAR: f32 = 0.1;

/// The experts of one token, layer by layer.
type Experts = Vec<BTreeSet<i32>>;

/// Experts and router logits of a pass, by token.
#[derive(Default)]
struct Seen {
    experts: Vec<Experts>,
    /// `[layer][T, E]`.
    logits: Vec<(usize, Vec<f32>)>,
}

impl Observer for Seen {
    fn hidden(&mut self, _: usize, _: Vec<f32>) {}

    fn topk(&mut self, _: usize, ids: TopkIds) {
        let tokens: Vec<_> = ids.ids.chunks_exact(ids.topk).map(|ids| ids.iter().copied().collect()).collect();
        self.experts.resize(tokens.len(), Vec::new());
        self.experts.iter_mut().zip(tokens).for_each(|(all, experts)| all.push(experts));
    }

    fn router_logits(&mut self, layer: usize, logits: Vec<f32>) {
        self.logits.push((layer, logits));
    }
}

/// A model that an engine runs, and which remembers with every row of the cache its token and the token's experts.
struct Watched<'a> {
    model: &'a Model<Cuda>,
    cache: <Cuda as Backend>::Cache,
    rows: Vec<(u32, Experts)>,
    /// The experts of the sequences that logits were given for.
    taken: BTreeMap<Vec<u32>, Vec<Experts>>,
}

impl Forward for Watched<'_> {
    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }

    fn max_position_embeddings(&self) -> usize {
        self.model.config().max_position_embeddings
    }

    fn reset(&mut self, blocks: usize) -> Result<()> {
        self.cache = self.model.cache(blocks)?;
        self.rows = vec![(0, Vec::new()); blocks * BLOCK_SIZE];
        Ok(())
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<Vec<f32>> {
        let mut seen = Seen::default();
        let hidden = self.model.forward(batch, &mut self.cache, Some(&mut seen))?;
        seen.experts.resize(batch.ids.len(), Vec::new());
        let mut tokens = batch.ids.iter().copied().zip(seen.experts);
        let mut last = Vec::with_capacity(batch.segments.len());
        for segment in batch.segments {
            let row = |position| segment.blocks[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE;
            let end = segment.position + segment.len;
            (segment.position..end).zip(&mut tokens).for_each(|(position, token)| self.rows[row(position)] = token);
            let (ids, experts) = (0..end).map(|position| self.rows[row(position)].clone()).unzip();
            self.taken.insert(ids, experts);
            last.push(last.last().map_or(0, |row| row + 1) + segment.len - 1);
        }
        self.model.logits(&hidden, &last)
    }
}

/// Reproducible choices (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % end as u64) as usize
    }

    /// Some begin alike, with a block and a few tokens.
    fn request(&mut self, vocab: usize) -> Request {
        let mut prompt = vec![7; [0, 0, 0, 70][self.below(4)]];
        let fresh = 1 + self.below(70);
        prompt.extend((0..fresh).map(|_| self.below(vocab) as u32));
        let max_new_tokens = 1 + self.below(24);
        let sampling = anabranch::Sampling::greedy();
        Request { prompt, max_new_tokens, sampling, seed: 0, stream: 0, eos: vec![] }
    }
}

/// Every request's tokens, once all are done; some are cancelled on the way if `cancel` is set.
fn run(engine: &mut Engine<impl Forward>, cancel: bool) -> BTreeMap<RequestId, (Vec<u32>, Option<Finish>)> {
    let mut outcomes: BTreeMap<_, (Vec<u32>, Option<Finish>)> = BTreeMap::new();
    let mut steps = 0;
    while !engine.is_idle() {
        steps += 1;
        for event in engine.step().unwrap().events {
            let Event::Token { request, id, finish } = event else { panic!("{event:?}") };
            let outcome = outcomes.entry(request).or_default();
            outcome.0.push(id);
            outcome.1 = finish;
            if cancel && finish.is_none() && steps % 10 == 0 && outcome.0.len() == 5 {
                assert!(engine.cancel(request));
            }
        }
    }
    outcomes
}

/// A thousand random requests, in a cache too small for those that run, some cancelled: under teacher forcing each token is the
/// likeliest of one pass over its sequence alone, wherever that is a clear choice, unless that pass sent it or a token before it to
/// other experts; and then the first such choice hangs on rounding.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_thousand_requests_match_one_by_one_decoding() {
    on_gpu(|gpu| {
        let names = golden();
        let (mut clear, mut all, mut moved, mut flips) = (0, 0, 0, 0);
        for (index, name) in names.iter().enumerate() {
            let model = load(name, gpu());
            let config = model.config();
            let watched =
                Watched { model: &model, cache: model.cache(0).unwrap(), rows: vec![], taken: BTreeMap::new() };
            let mut watched = watched;
            let limits = Limits { blocks: 14, running: 12, prompt_tokens: 96 };
            let mut engine = Engine::new(&mut watched, limits).unwrap();
            let mut random = Random(index as u64);
            let mut requests = BTreeMap::new();
            for _ in 0..1000_usize.div_ceil(names.len()) {
                let request = random.request(config.vocab_size);
                requests.insert(engine.submit(request.clone()).unwrap(), request);
            }
            let outcomes = run(&mut engine, true);
            assert_eq!(engine.free_blocks(), limits.blocks, "{name}");
            for (id, request) in &requests {
                let (new, finish) = &outcomes[id];
                assert!(finish.is_none() || new.len() == request.max_new_tokens, "{name}");
                // The last token was drawn and not computed.
                let ids = [&request.prompt, &new[..new.len() - 1]].concat();
                let (logits, alone) = alone(&model, &ids);
                let taken = &watched.taken[&ids];
                let differ = (0..ids.len()).find(|token| taken[*token] != alone.experts[*token]);
                if let Some(token) = differ {
                    flips += 1;
                    assert!(hangs_on_rounding(name, config, token, &taken[token], &alone), "{name}: token {token}");
                }
                for (at, id) in (request.prompt.len() - 1..).zip(new) {
                    let row = &logits[at * config.vocab_size..(at + 1) * config.vocab_size];
                    let of_others = row.iter().enumerate().filter(|(other, _)| *other != *id as usize);
                    let best = of_others.map(|(_, logit)| *logit).fold(f32::MIN, f32::max);
                    let margin = row[*id as usize] - best;
                    all += 1;
                    clear += usize::from(margin.abs() > CLEAR);
                    if margin < -CLEAR {
                        assert!(differ.is_some_and(|token| token <= at), "{name}: token {at} of {ids:?} is {id}");
                        moved += 1;
                    }
                }
            }
        }
        println!(
            "{clear} of {all} tokens are a clear choice; all but {moved} were taken, and those after {flips} sequences went to \
             other experts"
        );
        assert!(clear * 2 > all && moved * 20 <= clear);
    });
}

/// One pass over a sequence: the logits of all tokens, and where they went.
fn alone(model: &Model<Cuda>, ids: &[u32]) -> (Vec<f32>, Seen) {
    let blocks: Vec<u32> = (0..blocks_for(ids.len()) as u32).collect();
    let segments = [Segment { blocks: &blocks, position: 0, len: ids.len() }];
    let mut seen = Seen::default();
    let mut cache = model.cache(blocks.len()).unwrap();
    let batch = Batch { ids, segments: &segments };
    let hidden = model.forward_with(&batch, &mut cache, Some(&mut seen), &GivenRouting::new()).unwrap();
    seen.experts.resize(ids.len(), Vec::new());
    (model.logits(&hidden, &(0..ids.len()).collect::<Vec<_>>()).unwrap(), seen)
}

/// Whether the first layer in which a token went to other experts than alone could have sent it there.
fn hangs_on_rounding(name: &str, config: &Config, token: usize, taken: &Experts, alone: &Seen) -> bool {
    let Some(moe) = &config.moe else { return false };
    let Some(at) = (0..taken.len()).find(|at| taken[*at] != alone.experts[token][*at]) else { return false };
    let (layer, logits) = &alone.logits[at];
    let experts = moe.routing.num_experts();
    let logits = &logits[token * experts..(token + 1) * experts];
    let bias = selection_bias(name, config, *layer);
    could_be_chosen(&moe.routing, logits, bias.as_deref(), &taken[at])
        || taken[at]
            .difference(&alone.experts[token][at])
            .all(|expert| could_be_taken(&moe.routing, logits, bias.as_deref(), *expert))
}

/// What shares the passes, where blocks lie and who was cancelled changes rounding at most: the same requests in the same order give the
/// same tokens, bit for bit, every time.
#[test]
#[ignore = "needs a CUDA GPU"]
fn the_same_requests_give_the_same_tokens() {
    on_gpu(|gpu| {
        for name in ["qwen3-moe", "deepseek-v3"] {
            let model = load(name, gpu());
            let tokens = || {
                let session = anabranch_model::Session::new(&model).unwrap();
                let mut engine = Engine::new(session, Limits { running: 9, ..Limits::new(12) }).unwrap();
                let mut random = Random(5);
                let drawn = anabranch::Sampling::builder().temperature(0.9).top_k(50).top_p(0.95).build().unwrap();
                for stream in 0..40 {
                    let request = Request { seed: 3, stream, ..random.request(model.config().vocab_size) };
                    // Some are drawn, beside others that are not.
                    let sampling = if random.below(2) == 0 { drawn } else { request.sampling };
                    engine.submit(Request { sampling, ..request }).unwrap();
                }
                run(&mut engine, true)
            };
            assert_eq!(tokens(), tokens(), "{name}");
        }
    });
}
