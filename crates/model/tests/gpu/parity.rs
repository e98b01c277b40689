//! Logits and tokens. Weights and activations are bf16, the expected values float32: what is allowed is some rounding.

use std::{collections::BTreeSet, fs};

use anabranch_model::{Batch, Cpu, GivenRouting, Model, Observer, Segment, TopkIds, checkpoint::write_tensors};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use crate::support::{Expected, TABLES, assert_close, folder, golden, halves, load, logits, on_gpu, relative_error};

/// Of the logits of a whole prompt, relative to float32.
pub(crate) const LOGITS: f64 = 4e-2;

/// The bound for one model: no more than twice what Transformers' own bf16 is off, where that is known and less.
fn bound(name: &str) -> f64 {
    if name == "mixtral" { 2.2e-2 } else { LOGITS }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn logits_with_the_golden_routing() {
    on_gpu(|gpu| {
        for name in &golden() {
            let (model, expected) = (load(name, gpu()), Expected::open(name));
            let ids = expected.tokens("input_ids");
            let routing = expected.routing(model.config());
            let got = logits(&model, &ids, &halves(&ids), None, &routing);
            assert_close(name, &got, &expected.floats("logits"), bound(name));
        }
    });
}

/// LLaMA with `mlp_bias`: the golden one, with a bias as large as what it is added to in each projection of its dense layers.
#[test]
#[ignore = "needs a CUDA GPU"]
fn biased_dense_layers() {
    on_gpu(|gpu| {
        let dir = biased_llama();
        let ids = Expected::open("llama").tokens("input_ids");
        let segments = halves(&ids);
        let none = GivenRouting::new();
        let model = Model::load(dir.path(), gpu(), &mut |_, _| {}).unwrap();
        let reference = Model::load(dir.path(), Cpu, &mut |_, _| {}).unwrap();
        let expected = logits(&reference, &ids, &segments, None, &none);
        assert_close("llama with biases", &logits(&model, &ids, &segments, None, &none), &expected, LOGITS);
        let without = logits(&load("llama", Cpu), &ids, &segments, None, &none);
        assert!(relative_error(&without, &expected) > 10.0 * LOGITS, "the biases change too little to be seen");
    });
}

fn biased_llama() -> tempfile::TempDir {
    let golden = folder("llama");
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(golden.join("config.json")).unwrap()).unwrap();
    config["mlp_bias"] = json!(true);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();

    let stored = fs::read(golden.join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&stored).unwrap();
    let views = stored.tensors();
    let bias = |module: &str, rows: usize| -> Vec<u8> {
        let value = |row: usize| half::bf16::from_f32(((row * 37 + module.len() * 11) % 101) as f32 / 50.0 - 1.0);
        (0..rows).flat_map(|row| value(row).to_le_bytes()).collect()
    };
    let biases: Vec<(String, [usize; 1], Vec<u8>)> = views
        .iter()
        .filter_map(|(name, view)| {
            let module = name.strip_suffix(".weight").filter(|module| module.contains(".mlp."))?;
            let rows = view.shape()[0];
            Some((format!("{module}.bias"), [rows], bias(module, rows)))
        })
        .collect();
    assert!(!biases.is_empty());
    let weights = views.iter().map(|(name, view)| (name.as_str(), view.dtype(), view.shape(), view.data()));
    let biases = biases.iter().map(|(name, shape, data)| (name.as_str(), Dtype::BF16, &shape[..], &data[..]));
    write_tensors(&dir.path().join("model.safetensors"), weights.chain(biases), &[]).unwrap();
    dir
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn the_same_call_gives_the_same_bits() {
    on_gpu(|gpu| {
        for name in &golden() {
            let (model, expected) = (load(name, gpu()), Expected::open(name));
            let ids = expected.tokens("input_ids");
            let run = || logits(&model, &ids, &halves(&ids), None, &GivenRouting::new());
            let (first, second) = (run(), run());
            assert!(first.iter().zip(&second).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}");
        }
    });
}

/// The golden tokens go in; what comes out must be the likeliest in float32 wherever that is a clear choice: always with
/// float32's experts, and with the GPU's own unless it or a token before it went to other experts, which
/// `routing::flips_hang_on_rounding` judges.
#[test]
#[ignore = "needs a CUDA GPU"]
fn greedy_tokens_under_teacher_forcing() {
    on_gpu(|gpu| {
        let (mut clear, mut all, mut moved) = (0, 0, 0);
        for name in &golden() {
            let (model, reference, expected) = (load(name, gpu()), load(name, Cpu), Expected::open(name));
            let ids = expected.tokens("greedy");
            let segments = [Segment { blocks: &[0], position: 0, len: ids.len() }];
            let none = GivenRouting::new();
            let vocab = model.config().vocab_size;
            let (mut right, mut taken) = (Experts::default(), Experts::default());
            let float = logits(&reference, &ids, &segments, Some(&mut right), &none);
            let free = logits(&model, &ids, &segments, Some(&mut taken), &none);
            let given = logits(&model, &ids, &segments, None, &right.0);
            for (at, float) in float.chunks_exact(vocab).enumerate() {
                let [best, second] = best_two(float);
                all += 1;
                if float[best] - float[second] <= 0.1 {
                    continue;
                }
                clear += 1;
                let [given, free] = [&given, &free].map(|got| best_two(&got[at * vocab..(at + 1) * vocab])[0]);
                assert_eq!(given, best, "{name}: token {at}, with float32's experts");
                if free != best {
                    assert!(!taken.agree_up_to(at, &right), "{name}: token {at} is {free} instead of {best}");
                    moved += 1;
                }
            }
        }
        println!(
            "{clear} of {all} tokens are a clear choice in float32; all of them were taken with its experts, all but \
             {moved} with the GPU's own"
        );
    });
}

/// The experts that a pass chose.
#[derive(Default)]
pub(crate) struct Experts(pub(crate) GivenRouting);

impl Observer for Experts {
    fn hidden(&mut self, _: usize, _: Vec<f32>) {}

    fn topk(&mut self, layer: usize, ids: TopkIds) {
        self.0.insert(layer, ids);
    }
}

impl Experts {
    /// Whether the tokens up to and including `token` went to the same experts, in any order.
    fn agree_up_to(&self, token: usize, other: &Self) -> bool {
        self.0.iter().all(|(layer, ours)| {
            let theirs = &other.0[layer];
            let sets = |all: &TopkIds| -> Vec<BTreeSet<i32>> {
                all.ids.chunks_exact(all.topk).take(token + 1).map(|ids| ids.iter().copied().collect()).collect()
            };
            sets(ours) == sets(theirs)
        })
    }
}

fn best_two(logits: &[f32]) -> [usize; 2] {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    [order[0], order[1]]
}

/// Both prompts token by token, side by side, and in pieces of other lengths, against one pass.
#[test]
#[ignore = "needs a CUDA GPU"]
fn decoding_agrees_with_one_pass() {
    on_gpu(|gpu| {
        for name in &golden() {
            let (model, expected) = (load(name, gpu()), Expected::open(name));
            let ids = expected.tokens("input_ids");
            let routing = expected.routing(model.config());
            let one_pass = logits(&model, &ids, &halves(&ids), None, &routing);
            let len = ids.len() / 2;
            assert_eq!(len, 24, "the pieces below are of 24 tokens");
            for pieces in [vec![1; 24], vec![5, 1, 11, 7]] {
                let got = in_pieces(&model, &ids, &routing, &pieces);
                assert_close(&format!("{name} in {} pieces", pieces.len()), &got, &one_pass, LOGITS);
                assert_close(&format!("{name}, float32"), &got, &expected.floats("logits"), bound(name));
            }
        }
    });
}

/// Logits of two sequences whose tokens come some at a time.
fn in_pieces<B: anabranch_model::Backend>(
    model: &Model<B>,
    ids: &[u32],
    routing: &GivenRouting,
    pieces: &[usize],
) -> Vec<f32> {
    let half = ids.len() / 2;
    let mut cache = model.cache(TABLES.len()).unwrap();
    let mut got = [Vec::new(), Vec::new()];
    let mut position = 0;
    for &len in pieces {
        let segments = TABLES.each_ref().map(|blocks| Segment { blocks, position, len });
        let rows = |sequence: usize| sequence * half + position..sequence * half + position + len;
        let batch = [&ids[rows(0)], &ids[rows(1)]].concat();
        let given = |all: &TopkIds| {
            let slots = |sequence| rows(sequence).start * all.topk..rows(sequence).end * all.topk;
            TopkIds { ids: [&all.ids[slots(0)], &all.ids[slots(1)]].concat(), topk: all.topk }
        };
        let given: GivenRouting = routing.iter().map(|(layer, all)| (*layer, given(all))).collect();
        let batch = Batch { ids: &batch, segments: &segments };
        let hidden = model.forward_with(&batch, &mut cache, None, &given).unwrap();
        for (sequence, got) in got.iter_mut().enumerate() {
            let rows: Vec<usize> = (sequence * len..(sequence + 1) * len).collect();
            got.extend(model.logits(&hidden, &rows).unwrap());
        }
        position += len;
    }
    got.concat()
}

/// The last logits of a session, which has buffers of its own for them, are the model's, but for the order of a few rows' sums.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_session_gives_the_models_logits() {
    use anabranch_model::{Forward, Session};
    on_gpu(|gpu| {
        for name in &golden() {
            let (model, expected) = (load(name, gpu()), Expected::open(name));
            let ids = expected.tokens("input_ids");
            let segments = halves(&ids);
            let vocab = model.config().vocab_size;
            let all = logits(&model, &ids, &segments, None, &GivenRouting::new());
            let last = [ids.len() / 2 - 1, ids.len() - 1].map(|row| &all[row * vocab..(row + 1) * vocab]).concat();
            let mut session = Session::new(&model).unwrap();
            session.reset(2).unwrap();
            let got = session.forward(&Batch { ids: &ids, segments: &segments }).unwrap();
            let largest = last.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
            for (got, expected) in got.iter().zip(&last) {
                assert!((got - expected).abs() <= 1e-5 * largest, "{name}: {got} instead of {expected}");
            }
        }
    });
}
