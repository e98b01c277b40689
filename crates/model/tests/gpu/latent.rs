//! Latent attention's two ways on a GPU, in latents and with expanded heads, against the CPU, which knows the first alone. Which lengths go
//! which way stands in a test beside the choice (`src/cuda/attention/expansion.rs`): the prompts here are the ones of that.

use anabranch_model::{
    Backend, Batch, Config, Cpu, Cuda, Forward, GivenRouting, Model, Segment, Session, TopkIds, blocks_for,
};

use crate::{
    parity::{Experts, LOGITS},
    support::{assert_close, golden, load, on_gpu},
};

/// A sequence, with the logits and experts that a reference has for it.
struct Sequence {
    ids: Vec<u32>,
    logits: Vec<f32>,
    experts: GivenRouting,
}

impl Sequence {
    /// By one pass of the reference over it.
    fn new<B: Backend>(reference: &Model<B>, ids: Vec<u32>) -> Self {
        let blocks: Vec<u32> = (0..blocks_for(ids.len()) as u32).collect();
        let segments = [Segment { blocks: &blocks, position: 0, len: ids.len() }];
        let (mut experts, mut cache) = (Experts::default(), reference.cache(blocks.len()).unwrap());
        let batch = Batch { ids: &ids, segments: &segments };
        let hidden = reference.forward(&batch, &mut cache, Some(&mut experts)).unwrap();
        let logits = reference.logits(&hidden, &(0..ids.len()).collect::<Vec<_>>()).unwrap();
        Self { ids, logits, experts: experts.0 }
    }

    /// Ids that the seed makes.
    fn made<B: Backend>(reference: &Model<B>, len: u32, seed: u32) -> Self {
        let vocab = reference.config().vocab_size as u32;
        Self::new(reference, (0..len).map(|at| (at * 37 + at * at * 5 + seed) % vocab).collect())
    }
}

/// Some tokens of a sequence in a pass.
type Piece<'a> = (&'a Sequence, Segment<'a>);

/// One pass over these, with the reference's experts: the logits of each token are the reference's, but for rounding.
fn check<B: Backend>(what: &str, model: &Model<B>, cache: &mut B::Cache, pieces: &[Piece<'_>]) {
    let range = |segment: &Segment<'_>| segment.position..segment.position + segment.len;
    let ids: Vec<u32> = pieces.iter().flat_map(|(sequence, segment)| &sequence.ids[range(segment)]).copied().collect();
    let experts = |layer: &usize, topk: usize| {
        let of_piece = |(sequence, segment): &Piece<'_>| {
            let range = range(segment);
            sequence.experts[layer].ids[range.start * topk..range.end * topk].to_vec()
        };
        TopkIds { ids: pieces.iter().flat_map(of_piece).collect(), topk }
    };
    let routing: GivenRouting =
        pieces[0].0.experts.iter().map(|(layer, all)| (*layer, experts(layer, all.topk))).collect();
    let segments: Vec<Segment<'_>> = pieces.iter().map(|(_, segment)| *segment).collect();
    let hidden = model.forward_with(&Batch { ids: &ids, segments: &segments }, cache, None, &routing).unwrap();
    let (vocab, mut row) = (model.config().vocab_size, 0);
    for (sequence, segment) in pieces {
        let rows: Vec<usize> = (row..row + segment.len).collect();
        row += segment.len;
        let range = range(segment);
        let expected = &sequence.logits[range.start * vocab..range.end * vocab];
        let what = format!("{what}, {} tokens from {} on", segment.len, segment.position);
        // A few rows stray further than many together.
        let bound = if segment.len < 24 { 2.0 * LOGITS } else { LOGITS };
        assert_close(&what, &model.logits(&hidden, &rows).unwrap(), expected, bound);
    }
}

/// Runs a test on every golden model with latent attention, beside the CPU's.
fn each(test: impl Fn(&str, &Model<Cuda>, &Model<Cpu>)) {
    on_gpu(|gpu| {
        let names: Vec<String> = golden().into_iter().filter(|name| is_latent(name)).collect();
        assert!(names.len() >= 3, "{names:?}");
        names.iter().for_each(|name| test(name, &load(name, gpu()), &load(name, Cpu)));
    });
}

fn is_latent(name: &str) -> bool {
    ["deepseek-v2", "deepseek-v3"].iter().any(|family| name.starts_with(family))
}

/// Blocks out of order.
const TABLE: [u32; 4] = [5, 0, 6, 3];

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_long_prompt_in_one_pass() {
    each(|name, model, reference| {
        let sequence = Sequence::made(reference, 200, 11);
        let segment = Segment { blocks: &TABLE, position: 0, len: 200 };
        check(name, model, &mut model.cache(8).unwrap(), &[(&sequence, segment)]);
    });
}

/// The second piece sees keys that the first one left as latents, and so do the tokens after both.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_prompt_in_pieces_and_tokens_after_it() {
    each(|name, model, reference| {
        let sequence = Sequence::made(reference, 204, 5);
        let mut cache = model.cache(8).unwrap();
        let mut position = 0;
        for len in [130, 70, 1, 1, 2] {
            let segment = Segment { blocks: &TABLE, position, len };
            check(name, model, &mut cache, &[(&sequence, segment)]);
            position += len;
        }
    });
}

/// A token that is decoded and the end of a short sequence beside prompts: one that begins with another sequence's block, and a new one.
#[test]
#[ignore = "needs a CUDA GPU"]
fn prompts_beside_tokens_that_are_decoded() {
    each(|name, model, reference| {
        let first = Sequence::made(reference, 66, 1);
        let short = Sequence::made(reference, 6, 2);
        let alike = [&first.ids[..64], &Sequence::made(reference, 137, 3).ids].concat();
        let (alike, new) = (Sequence::new(reference, alike), Sequence::made(reference, 91, 4));
        let segment = |blocks, position, len| Segment { blocks, position, len };
        let (a, b, c, d) = (&[7, 1][..], &[4][..], &[7, 2, 6, 0][..], &[3, 5][..]);
        let mut cache = model.cache(8).unwrap();
        check(name, model, &mut cache, &[(&first, segment(a, 0, 64)), (&short, segment(b, 0, 3))]);
        let mixed = [
            (&first, segment(a, 64, 1)),
            (&short, segment(b, 3, 2)),
            (&alike, segment(c, 64, 136)),
            (&new, segment(d, 0, 90)),
        ];
        check(name, model, &mut cache, &mixed);
        let decoded = [
            (&first, segment(a, 65, 1)),
            (&short, segment(b, 5, 1)),
            (&alike, segment(c, 200, 1)),
            (&new, segment(d, 90, 1)),
        ];
        check(name, model, &mut cache, &decoded);
    });
}

/// Heads of a published size, which have a kernel of their own: two layers of DeepSeek-V2-Lite, against pieces that are too short to be
/// expanded.
#[test]
#[ignore = "needs a CUDA GPU"]
fn published_heads_agree_with_latents() {
    on_gpu(|gpu| {
        let mut config = Config::preset("deepseek-v2-lite").unwrap().unwrap();
        config.layers.truncate(2);
        let model = Model::random(config, 0, gpu(), &mut |_, _| {}).unwrap();
        let sequence = Sequence::made(&model, 640, 9);
        let blocks: Vec<u32> = (0..10).rev().collect();
        for len in [32, 320] {
            let mut cache = model.cache(10).unwrap();
            for position in (0..640).step_by(len) {
                let segment = Segment { blocks: &blocks, position, len };
                check("deepseek-v2-lite", &model, &mut cache, &[(&sequence, segment)]);
            }
        }
    });
}

/// Pieces of prompts allocate once, and give the same bits every time, whatever the buffers held.
#[test]
#[ignore = "needs a CUDA GPU"]
fn expanded_heads_are_memory_that_stays() {
    each(|name, model, _| {
        let vocab = model.config().vocab_size as u32;
        let ids: Vec<u32> = (0..200).map(|at| at * 7 % vocab).collect();
        let pass = |session: &mut Session<'_, Cuda>, position: usize, len: usize| {
            let segments = [Segment { blocks: &TABLE, position, len }];
            let logits = session.forward(&Batch { ids: &ids[position..position + len], segments: &segments }).unwrap();
            logits.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        let mut session = Session::new(model).unwrap();
        session.reset(8).unwrap();
        let whole = pass(&mut session, 0, 200);
        let pieces = |session: &mut Session<'_, Cuda>| [(0, 130), (130, 70)].map(|(at, len)| pass(session, at, len));
        let first = pieces(&mut session);
        let before = model.backend().usage();
        assert_eq!((pieces(&mut session), pass(&mut session, 0, 200)), (first, whole), "{name}");
        assert_eq!(model.backend().usage(), before, "{name}");
    });
}
