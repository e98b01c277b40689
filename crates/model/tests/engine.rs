//! Requests that join, wait, are cancelled and share a cache, against each of them alone.

#[path = "common/fake.rs"]
mod fake;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anabranch::{Sampling, reference::sample};
use anabranch_model::{
    Batch, Cpu, Draw, Engine, Event, Finish, Forward, Limits, Model, Request, RequestId, Result, Segment, Session,
    blocks_for,
};
use fake::Fake;
use rand_chacha::{
    ChaCha12Rng,
    rand_core::{RngCore, SeedableRng},
};

/// Reproducible choices.
struct Random(ChaCha12Rng);

impl Random {
    fn new(seed: u64) -> Self {
        Self(ChaCha12Rng::seed_from_u64(seed))
    }

    fn below(&mut self, end: usize) -> usize {
        (self.0.next_u64() % end as u64) as usize
    }

    fn ids(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| self.below(vocab) as u32).collect()
    }
}

fn greedy(prompt: Vec<u32>, max_new_tokens: usize) -> Request {
    Request { prompt, max_new_tokens, sampling: Sampling::greedy(), seed: 0, stream: 0, eos: vec![] }
}

/// What a request got.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Outcome {
    ids: Vec<u32>,
    finish: Option<Finish>,
    failed: bool,
}

#[derive(Default)]
struct Outcomes(BTreeMap<RequestId, Outcome>);

impl Outcomes {
    fn note(&mut self, events: Vec<Event>) {
        let mut seen = BTreeSet::new();
        for event in events {
            let (Event::Token { request, .. } | Event::Failed { request, .. }) = event;
            assert!(seen.insert(request), "one event of each request");
            let outcome = self.0.entry(request).or_default();
            assert!(outcome.finish.is_none() && !outcome.failed, "nothing follows the end");
            match event {
                Event::Token { id, finish, .. } => {
                    outcome.ids.push(id);
                    outcome.finish = finish;
                }
                Event::Failed { .. } => outcome.failed = true,
            }
        }
    }
}

/// Steps until nothing is left.
fn finish<F: Forward>(engine: &mut Engine<F>, outcomes: &mut Outcomes) {
    while !engine.is_idle() {
        outcomes.note(engine.step().unwrap().events);
    }
}

/// A request by itself, with all the room there is.
fn alone(model: impl Forward, request: &Request) -> Outcome {
    let mut engine = Engine::new(model, Limits::new(64)).unwrap();
    let id = engine.submit(request.clone()).unwrap();
    let mut outcomes = Outcomes::default();
    finish(&mut engine, &mut outcomes);
    outcomes.0.remove(&id).unwrap()
}

/// Short and long, some that begin alike, greedy and drawn.
fn any_request(random: &mut Random, stream: u64) -> Request {
    let fresh = 1 + random.below(150);
    let mut prompt = vec![7; [0, 0, 64, 130][random.below(4)]];
    prompt.extend(random.ids(fresh, 512));
    let sampling = if random.below(2) == 0 {
        Sampling::greedy()
    } else {
        Sampling::builder().temperature(0.9).top_k(40).repetition_penalty(1.1).build().unwrap()
    };
    Request { prompt, max_new_tokens: 1 + random.below(90), sampling, seed: 3, stream, eos: vec![1, 2, 3] }
}

/// A thousand requests that come and go at random, many of them cancelled, in caches from ample to the least that takes them: each gets
/// what it gets alone, up to where it was cancelled, and all blocks come back.
#[test]
fn a_thousand_requests_get_what_each_gets_alone() {
    for (seed, limits) in [
        Limits::new(400),
        Limits { blocks: 12, running: 8, prompt_tokens: 100 },
        Limits { blocks: 6, running: 5, prompt_tokens: 64 },
        Limits { blocks: 30, running: 1000, prompt_tokens: 1 },
    ]
    .into_iter()
    .enumerate()
    {
        let mut random = Random::new(seed as u64);
        let mut engine = Engine::new(Fake::hashing(370), limits).unwrap();
        let (mut requests, mut cancelled, mut outcomes) = (BTreeMap::new(), BTreeSet::new(), Outcomes::default());
        let (mut computed, mut gave_back) = (0, 0);
        while requests.len() < 250 || !engine.is_idle() {
            if requests.len() < 250 && random.below(3) == 0 {
                for _ in 0..random.below(12) {
                    let request = any_request(&mut random, requests.len() as u64);
                    requests.insert(engine.submit(request.clone()).unwrap(), request);
                }
            }
            if random.below(20) == 0 && !requests.is_empty() {
                let (id, _) = requests.iter().nth(random.below(requests.len())).unwrap();
                if engine.cancel(*id) {
                    assert!(!engine.cancel(*id));
                    cancelled.insert(*id);
                }
            }
            let before = engine.running();
            let step = engine.step().unwrap();
            let ended =
                step.events.iter().filter(|event| matches!(event, Event::Token { finish: Some(_), .. })).count();
            gave_back += usize::from(engine.running() + ended < before);
            // Pieces of one token have their own place, as decoding has.
            assert!(step.prompt_tokens <= limits.prompt_tokens + limits.running);
            assert!(engine.running() <= limits.running);
            computed += step.prompt_tokens + step.decode_tokens;
            outcomes.note(step.events);
        }
        assert_eq!(engine.free_blocks(), limits.blocks);
        let mut needed = 0;
        for (id, request) in &requests {
            let got = outcomes.0.remove(id).unwrap_or_default();
            let expected = alone(Fake::hashing(370), request);
            if cancelled.contains(id) {
                assert!(got.finish.is_none() && expected.ids.starts_with(&got.ids));
            } else {
                assert_eq!(got, expected);
            }
            needed += request.prompt.len() + got.ids.len();
        }
        assert!(outcomes.0.is_empty());
        println!(
            "{limits:?}: {computed} tokens were computed for {needed}, {} were cancelled, at least {gave_back} gave blocks back",
            cancelled.len()
        );
        assert!(limits.blocks > 12 || gave_back > 0);
    }
}

/// The tokens of a request are the likeliest of its logits.
#[test]
fn greedy_requests_follow_the_largest_logit() {
    let model = Fake::hashing(512);
    let got = alone(Fake::hashing(512), &greedy(vec![4, 5, 6], 70));
    let mut ids = vec![4, 5, 6];
    for &id in &got.ids {
        let row = model.row(&ids);
        assert!(row.iter().all(|logit| *logit <= row[id as usize]));
        ids.push(id);
    }
    assert_eq!((got.ids.len(), got.finish), (70, Some(Finish::Length)));
    // EOS is the last token, whatever the length.
    let request = Request { eos: vec![got.ids[9]], ..greedy(vec![4, 5, 6], 70) };
    let ended = alone(Fake::hashing(512), &request);
    assert_eq!(ended.finish, Some(Finish::Eos));
    assert!(got.ids.starts_with(&ended.ids) && ended.ids.last() == Some(&got.ids[9]));
}

/// Rules and seeds of requests that share a batch, none like another.
fn mixture() -> Vec<Request> {
    let drawn = || Sampling::builder().temperature(0.8);
    let penalized = |builder: anabranch::SamplingBuilder| builder.repetition_penalty(1.3);
    let rules = [
        Sampling::greedy(),
        drawn().build().unwrap(),
        drawn().top_k(9).top_p(0.9).build().unwrap(),
        penalized(drawn().temperature(0.0)).build().unwrap(),
        penalized(drawn().min_p(0.02)).build().unwrap(),
        drawn().build().unwrap(),
    ];
    let request = |(index, sampling): (usize, Sampling)| {
        let prompt = vec![40 + index as u32; 1 + 37 * index];
        // The last one has the seed of the second, and a stream of its own.
        let (seed, stream) = if index == 5 { (1, 9) } else { (index as u64, 0) };
        Request { sampling, seed, stream, ..greedy(prompt, 80) }
    };
    rules.into_iter().enumerate().map(request).collect()
}

/// What a request gets, by its definition: one number of its seed's stream for each token, and nothing else.
fn defined(model: &Fake, request: &Request) -> Vec<u32> {
    let mut random = ChaCha12Rng::seed_from_u64(request.seed);
    random.set_stream(request.stream);
    let mut ids = request.prompt.clone();
    for _ in 0..request.max_new_tokens {
        let u = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        ids.push(sample(&request.sampling, &model.row(&ids), &ids, u).unwrap());
    }
    ids.split_off(request.prompt.len())
}

/// A model that draws by itself and shows no logits.
struct Drawing(Fake);

impl Forward for Drawing {
    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    fn max_position_embeddings(&self) -> usize {
        self.0.max_position_embeddings()
    }

    fn reset(&mut self, blocks: usize) -> Result<()> {
        self.0.reset(blocks)
    }

    fn forward(&mut self, _: &Batch<'_>) -> Result<Vec<f32>> {
        panic!("nobody needs logits");
    }

    fn sample(&mut self, batch: &Batch<'_>, draws: &[Draw<'_>]) -> Result<Vec<Result<u32>>> {
        for (segment, draw) in batch.segments.iter().zip(draws) {
            // In the middle of a prompt nothing is drawn.
            assert!(draw.seen.len() == segment.position + segment.len || *draw == Draw::greedy());
        }
        self.0.sample(batch, draws)
    }
}

/// Tokens hang on the request alone: not on what else is in the batch, on who waits or computes again, or on passes that fail.
#[test]
fn each_request_draws_from_its_own_stream() {
    let requests = mixture();
    let expected: Vec<Vec<u32>> = requests.iter().map(|request| defined(&Fake::hashing(512), request)).collect();
    assert_ne!(expected[1], expected[5]);
    for (limits, fail, reversed) in [
        (Limits::new(64), None, false),
        (Limits::new(64), None, true),
        (Limits { blocks: 7, running: 4, prompt_tokens: 32 }, None, false),
        (Limits { blocks: 9, running: 6, prompt_tokens: 64 }, Some(5), true),
        (Limits { blocks: 9, running: 6, prompt_tokens: 64 }, Some(90), false),
    ] {
        let mut model = Fake::hashing(512);
        model.fail = fail;
        let mut engine = Engine::new(Drawing(model), limits).unwrap();
        let mut order: Vec<usize> = (0..requests.len()).collect();
        if reversed {
            order.reverse();
        }
        let names = order.iter().map(|index| (engine.submit(requests[*index].clone()).unwrap(), *index));
        let names: BTreeMap<RequestId, usize> = names.collect();
        let (mut outcomes, mut failures) = (Outcomes::default(), 0);
        while !engine.is_idle() {
            match engine.step() {
                Ok(step) => outcomes.note(step.events),
                Err(_) => failures += 1,
            }
        }
        assert_eq!(failures, usize::from(fail.is_some()));
        for (id, outcome) in outcomes.0 {
            assert_eq!(outcome.ids, expected[names[&id]], "request {} with {limits:?}", names[&id]);
        }
    }
}

#[test]
fn a_model_that_gives_too_few_tokens_is_an_error() {
    struct Silent;
    impl Forward for Silent {
        fn vocab_size(&self) -> usize {
            512
        }
        fn max_position_embeddings(&self) -> usize {
            512
        }
        fn reset(&mut self, _: usize) -> Result<()> {
            Ok(())
        }
        fn forward(&mut self, _: &Batch<'_>) -> Result<Vec<f32>> {
            Ok(vec![])
        }
        fn sample(&mut self, _: &Batch<'_>, _: &[Draw<'_>]) -> Result<Vec<Result<u32>>> {
            Ok(vec![])
        }
    }
    let mut engine = Engine::new(Silent, Limits::new(4)).unwrap();
    engine.submit(greedy(vec![1], 1)).unwrap();
    assert_eq!(engine.step().unwrap_err().to_string(), "engine: tokens must be one for each of 1 segments, got 0");
}

#[test]
fn a_session_wants_a_draw_for_each_segment() {
    let model = Model::load(&golden()[0], Cpu, &mut |_, _| {}).unwrap();
    let mut session = Session::new(&model).unwrap();
    session.reset(1).unwrap();
    let segments = [Segment { blocks: &[0], position: 0, len: 2 }];
    let batch = Batch { ids: &[3, 4], segments: &segments };
    let error = session.sample(&batch, &[]).unwrap_err().to_string();
    assert_eq!(error, "0 draws were given for 1 segments: give one for each");
    // Nothing was computed: the same pass is still the next one.
    let drawn = Draw { sampling: Sampling::builder().build().unwrap(), seen: &[], u: 0.7 };
    let token = session.sample(&batch, &[drawn]).unwrap().remove(0).unwrap();
    session.reset(1).unwrap();
    assert_eq!(token, drawn.token(&session.forward(&batch).unwrap()).unwrap());
}

/// A long prompt comes in pieces; what decodes meanwhile gets a token in every pass.
#[test]
fn decoding_goes_on_beside_a_prompt() {
    let mut engine = Engine::new(Fake::hashing(4096), Limits { prompt_tokens: 128, ..Limits::new(64) }).unwrap();
    let first = engine.submit(greedy(vec![9; 3], 100)).unwrap();
    engine.step().unwrap();
    let second = engine.submit(greedy(vec![8; 1000], 5)).unwrap();
    for piece in 0..8 {
        let step = engine.step().unwrap();
        let len = if piece < 7 { 128 } else { 1000 - 7 * 128 };
        assert_eq!((step.prompt_tokens, step.decode_tokens), (len, 1));
        let of = |id| step.events.iter().any(|event| matches!(event, Event::Token { request, .. } if *request == id));
        assert!(of(first) && of(second) == (piece == 7), "piece {piece}");
    }
}

/// Requests run in the order in which they came, and the first ones are never held up by later ones.
#[test]
fn the_youngest_waits_when_the_cache_is_full() {
    let mut engine = Engine::new(Fake::hashing(512), Limits::new(4)).unwrap();
    let [first, second] = [1, 2].map(|id| engine.submit(greedy(vec![id; 100], 120)).unwrap());
    let third = engine.submit(greedy(vec![3; 10], 120)).unwrap();
    let mut order = Vec::new();
    let mut turns = Vec::new();
    while !engine.is_idle() {
        turns.push((engine.running(), engine.waiting()));
        for event in engine.step().unwrap().events {
            if let Event::Token { request, finish: Some(_), .. } = event {
                order.push(request);
            }
        }
    }
    assert_eq!(order, [first, second, third]);
    assert!(turns.contains(&(2, 1)) && turns.contains(&(1, 2)), "the second ran, gave its blocks back, and waited");
}

#[test]
fn full_blocks_of_the_same_tokens_are_computed_once() {
    let mut engine = Engine::new(Fake::hashing(512), Limits::new(16)).unwrap();
    let mut computed = |prompt: Vec<u32>| {
        let expected = alone(Fake::hashing(512), &greedy(prompt.clone(), 3));
        engine.submit(greedy(prompt, 3)).unwrap();
        let (mut tokens, mut outcomes) = (0, Outcomes::default());
        while !engine.is_idle() {
            let step = engine.step().unwrap();
            tokens += step.prompt_tokens;
            outcomes.note(step.events);
        }
        assert_eq!(outcomes.0.into_values().next_back(), Some(expected));
        tokens
    };
    let prompt: Vec<u32> = (0..200).collect();
    assert_eq!(computed(prompt.clone()), 200);
    assert_eq!(computed(prompt.clone()), 200 - 3 * 64);
    assert_eq!(computed(prompt[..128].to_vec()), 64, "a last token is computed, with its block");
    assert_eq!(computed([&prompt[..100], &[1; 60]].concat()), 160 - 64);
    assert_eq!(computed(prompt[1..].to_vec()), 199);
}

/// The same pass again, as if nothing had been.
#[test]
fn a_pass_that_fails_loses_nothing() {
    let prompts = [vec![5; 200], vec![6; 30], vec![7; 90]];
    for fail in 1..40 {
        let mut model = Fake::hashing(512);
        model.fail = Some(fail);
        let mut engine = Engine::new(model, Limits { prompt_tokens: 64, ..Limits::new(8) }).unwrap();
        let ids = prompts.each_ref().map(|prompt| engine.submit(greedy(prompt.clone(), 50)).unwrap());
        let (mut outcomes, mut failures) = (Outcomes::default(), 0);
        while !engine.is_idle() {
            match engine.step() {
                Ok(step) => outcomes.note(step.events),
                Err(error) => {
                    assert_eq!(error.to_string(), "this pass fails");
                    failures += 1;
                }
            }
        }
        assert_eq!((failures, engine.free_blocks()), (1, 8));
        for (id, prompt) in ids.iter().zip(&prompts) {
            assert_eq!(
                outcomes.0[id],
                alone(Fake::hashing(512), &greedy(prompt.clone(), 50)),
                "failing in pass {fail}"
            );
        }
    }
}

#[test]
fn logits_that_are_none_end_their_request_alone() {
    let mut model = Fake::hashing(512);
    model.poison = Some(500);
    let mut engine = Engine::new(model, Limits::new(16)).unwrap();
    let prompts = [vec![5; 80], vec![500; 80], vec![7; 20]];
    let ids = prompts.each_ref().map(|prompt| engine.submit(greedy(prompt.clone(), 20)).unwrap());
    let mut outcomes = Outcomes::default();
    finish(&mut engine, &mut outcomes);
    assert!(outcomes.0[&ids[1]].failed);
    for index in [0, 2] {
        assert_eq!(outcomes.0[&ids[index]], alone(Fake::hashing(512), &greedy(prompts[index].clone(), 20)));
    }
    assert_eq!(engine.free_blocks(), 16);
}

#[test]
fn requests_and_limits_that_are_refused() {
    let limits = Limits { blocks: 4, running: 2, prompt_tokens: 32 };
    for wrong in
        [Limits { blocks: 0, ..limits }, Limits { running: 0, ..limits }, Limits { prompt_tokens: 0, ..limits }]
    {
        let error = Engine::new(Fake::hashing(512), wrong).unwrap_err().to_string();
        assert!(error.starts_with("an engine's limits must be at least 1"), "{error}");
    }
    let mut engine = Engine::new(Fake::hashing(512), limits).unwrap();
    let mut refused = |request| engine.submit(request).unwrap_err().to_string();
    assert_eq!(refused(greedy(vec![], 1)), "the prompt is empty: give it at least one token");
    assert_eq!(refused(greedy(vec![1], 0)), "max_new_tokens must be at least 1, got 0");
    assert!(refused(greedy(vec![512], 1)).starts_with("the prompt holds the token id 512"));
    assert!(refused(greedy(vec![1; 512], 1)).starts_with("the prompt has 512 tokens, but the model has 512"));
    assert!(refused(greedy(vec![1; 200], 58)).starts_with(
        "a prompt of 200 tokens with its output may need 257 tokens of cache, which holds 256: make the cache larger"
    ));
    assert!(engine.is_idle() && engine.step().unwrap().events.is_empty());
    engine.submit(greedy(vec![1; 200], 57)).unwrap();
    assert_eq!((engine.running(), engine.waiting()), (0, 1));
}

fn golden() -> Vec<PathBuf> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
    let mut folders: Vec<PathBuf> = std::fs::read_dir(models).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    folders
}

/// A thousand random requests through the golden models, in a cache that is too small for those that run, against one pass over each
/// by itself: every token is the likeliest there, wherever that is a clear choice.
#[test]
fn a_thousand_requests_match_one_by_one_decoding() {
    /// Of logits in float32, whose sums run in another order.
    const CLEAR: f32 = 1e-3;
    let (mut clear, mut all) = (0, 0);
    let folders = golden();
    for (index, folder) in folders.iter().enumerate() {
        let model = Model::load(folder, Cpu, &mut |_, _| {}).unwrap();
        let vocab = model.config().vocab_size;
        let mut random = Random::new(index as u64);
        let limits = Limits { blocks: 14, running: 12, prompt_tokens: 96 };
        let mut engine = Engine::new(Session::new(&model).unwrap(), limits).unwrap();
        let mut requests = BTreeMap::new();
        for _ in 0..1000_usize.div_ceil(folders.len()) {
            let fresh = 1 + random.below(70);
            let mut prompt = vec![7; [0, 0, 0, 64][random.below(4)]];
            prompt.extend(random.ids(fresh, vocab));
            let new = 1 + random.below(24);
            requests.insert(engine.submit(greedy(prompt.clone(), new)).unwrap(), (prompt, new));
        }
        let mut outcomes = Outcomes::default();
        finish(&mut engine, &mut outcomes);
        for (id, (prompt, new)) in requests {
            let got = &outcomes.0[&id];
            assert_eq!((got.ids.len(), got.finish), (new, Some(Finish::Length)));
            let ids = [prompt.as_slice(), &got.ids].concat();
            let blocks: Vec<u32> = (0..blocks_for(ids.len()) as u32).collect();
            let segments = [Segment { blocks: &blocks, position: 0, len: ids.len() }];
            let mut cache = model.cache(blocks.len()).unwrap();
            let hidden = model.forward(&Batch { ids: &ids, segments: &segments }, &mut cache, None).unwrap();
            let rows: Vec<usize> = (prompt.len() - 1..ids.len() - 1).collect();
            let logits = model.logits(&hidden, &rows).unwrap();
            for (at, (logits, id)) in logits.chunks_exact(vocab).zip(&got.ids).enumerate() {
                let best = logits.iter().copied().fold(f32::MIN, f32::max);
                all += 1;
                let others = logits.iter().enumerate().filter(|(other, _)| *other != *id as usize);
                let second = others.map(|(_, logit)| *logit).fold(f32::MIN, f32::max);
                clear += usize::from(best - second > CLEAR);
                assert!(
                    best - logits[*id as usize] <= CLEAR,
                    "{}: new token {at} of a prompt of {} is {id}",
                    folder.display(),
                    prompt.len()
                );
            }
        }
    }
    println!("{clear} of {all} tokens are a clear choice");
    assert!(clear * 10 > all * 9);
}
