//! Decode steps that are recorded and repeated against steps that are launched piece by piece.

use anabranch::{Sampling, reference::sample};
use anabranch_model::{BLOCK_SIZE, Batch, Cuda, CudaCache, Draw, Forward, Model, Segment, Session, blocks_for};

use crate::support::{golden, load, on_gpu};

/// Tokens of the prompts: of one block and of several, and so long that the steps below pass a context of 256.
const PROMPTS: [usize; 2] = [31, 200];
const STEPS: usize = 80;

/// Blocks of each sequence, scattered and out of order.
fn tables() -> [Vec<u32>; 2] {
    let [short, long] = PROMPTS.map(|len| blocks_for(len + STEPS) as u32);
    [(0..short).map(|block| 2 * block + 1).collect(), (0..long).rev().map(|block| 2 * block).collect()]
}

fn new_session(model: &Model<Cuda>) -> Session<'_, Cuda> {
    let mut session = Session::new(model).unwrap();
    session.reset(blocks()).unwrap();
    session
}

/// Of a cache that holds both sequences.
fn blocks() -> usize {
    2 * blocks_for(PROMPTS[1] + STEPS)
}

/// The tokens that follow the prompts of these sequences, [`STEPS`] of each, by a session's `next`.
fn decode(
    model: &Model<Cuda>,
    sequences: &[usize],
    next: &mut dyn FnMut(&mut Session<'_, Cuda>, &Batch<'_>) -> Vec<u32>,
) -> Vec<Vec<u32>> {
    let (tables, vocab) = (tables(), model.config().vocab_size as u32);
    let mut session = new_session(model);
    let segment = |sequence: usize, position, len| Segment { blocks: &tables[sequence], position, len };
    let prompts: Vec<Vec<u32>> = sequences
        .iter()
        .map(|sequence| (0..PROMPTS[*sequence] as u32).map(|at| (at * 37 + 11 * *sequence as u32) % vocab).collect())
        .collect();
    let segments: Vec<_> = sequences.iter().map(|sequence| segment(*sequence, 0, PROMPTS[*sequence])).collect();
    let mut ids = next(&mut session, &Batch { ids: &prompts.concat(), segments: &segments });
    let mut all = vec![ids.clone()];
    for step in 0..STEPS - 1 {
        let segments: Vec<_> =
            sequences.iter().map(|sequence| segment(*sequence, PROMPTS[*sequence] + step, 1)).collect();
        ids = next(&mut session, &Batch { ids: &ids, segments: &segments });
        all.push(ids.clone());
    }
    all
}

/// The most probable tokens of a pass that may be a recorded one.
fn greedy(session: &mut Session<'_, Cuda>, batch: &Batch<'_>) -> Vec<u32> {
    let draws = vec![Draw::greedy(); batch.segments.len()];
    session.sample(batch, &draws).unwrap().into_iter().map(|id| id.unwrap()).collect()
}

/// The tokens of a pass that is launched piece by piece.
fn piece_by_piece(model: &Model<Cuda>, cache: &mut CudaCache, batch: &Batch<'_>) -> Vec<u32> {
    let vocab = model.config().vocab_size;
    let hidden = model.forward(batch, cache, None).unwrap();
    let ends = batch.segments.iter().scan(0, |end, segment| {
        *end += segment.len;
        Some(*end - 1)
    });
    let logits = model.logits(&hidden, &ends.collect::<Vec<_>>()).unwrap();
    let choose = |logits: &[f32]| sample(&Sampling::greedy(), logits, &[], 0.0).unwrap();
    logits.chunks_exact(vocab).map(choose).collect()
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn repeated_steps_give_the_same_tokens() {
    on_gpu(|gpu| {
        assert!(PROMPTS[1] < 256 && PROMPTS[1] + STEPS > 256 + BLOCK_SIZE / 4);
        for name in &golden() {
            let model = load(name, gpu());
            let vocab = model.config().vocab_size;
            for sequences in [&[0, 1][..], &[1], &[0]] {
                let mut cache = model.cache(blocks()).unwrap();
                let expected = decode(&model, sequences, &mut |_, batch| piece_by_piece(&model, &mut cache, batch));
                let by_token = decode(&model, sequences, &mut greedy);
                assert_eq!(by_token, expected, "{name}: sequences {sequences:?}");
                let by_logits = decode(&model, sequences, &mut |session, batch| {
                    let logits = session.forward(batch).unwrap();
                    let choose = |logits: &[f32]| sample(&Sampling::greedy(), logits, &[], 0.0).unwrap();
                    logits.chunks_exact(vocab).map(choose).collect()
                });
                assert_eq!(by_logits, expected, "{name}: sequences {sequences:?}");
            }
        }
    });
}

/// Sequences join and leave, and passes over prompts come between: what was recorded for as many sequences serves again, and is forgotten
/// where a buffer has grown.
#[test]
#[ignore = "needs a CUDA GPU"]
fn recorded_steps_outlive_other_passes() {
    on_gpu(|gpu| {
        for name in &golden() {
            let model = load(name, gpu());
            let tables = tables();
            let run = |repeat: bool| {
                let mut session = new_session(&model);
                let mut cache = model.cache(blocks()).unwrap();
                let mut next = |ids: &[u32], segments: &[Segment<'_>]| -> Vec<u32> {
                    let batch = Batch { ids, segments };
                    if repeat {
                        return greedy(&mut session, &batch);
                    }
                    piece_by_piece(&model, &mut cache, &batch)
                };
                let segment = |sequence: usize, position, len| Segment { blocks: &tables[sequence], position, len };
                let mut all = Vec::new();
                let mut first = next(&[5, 6, 7], &[segment(0, 0, 3)]);
                for position in 3..8 {
                    first = next(&first, &[segment(0, position, 1)]);
                    all.push(first[0]);
                }
                // A longer prompt than any pass before: buffers grow.
                let prompt: Vec<u32> = (0..90).collect();
                let mut second = next(&prompt, &[segment(1, 0, 90)]);
                for step in 0..6 {
                    let ids = next(&[first[0], second[0]], &[segment(0, 8 + step, 1), segment(1, 90 + step, 1)]);
                    (first, second) = (vec![ids[0]], vec![ids[1]]);
                    all.extend(ids);
                    first = next(&first, &[segment(0, 8 + step, 1)]);
                    all.push(first[0]);
                }
                all
            };
            assert_eq!(run(true), run(false), "{name}");
        }
    });
}
