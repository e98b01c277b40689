//! Every bundled checkpoint against what Transformers computed from it (tests/golden/generate.py).

use std::path::{Path, PathBuf};

use anabranch_model::{
    Batch, Cpu, ExpertUsage, GivenRouting, LayerUsage, Model, Observer, Segment, TensorFile, TopkIds,
};

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
}

struct Expected(TensorFile);

impl Expected {
    fn floats(&self, name: &str) -> Vec<f32> {
        self.0.get(name).unwrap().to_f32().unwrap()
    }

    fn ids(&self, name: &str) -> Vec<i64> {
        self.0.get(name).unwrap().to_i64().unwrap()
    }

    fn tokens(&self, name: &str) -> Vec<u32> {
        self.ids(name).iter().map(|id| *id as u32).collect()
    }
}

fn open(name: &str) -> (Model, Expected) {
    let model = Model::load(&folder(name), Cpu, &mut |_, _| {}).unwrap();
    (model, Expected(TensorFile::open(&folder(name).join("expected.safetensors")).unwrap()))
}

/// What a forward pass showed on its way.
#[derive(Default)]
struct Seen {
    hidden: Vec<Vec<f32>>,
    topk: Vec<(usize, TopkIds)>,
}

impl Observer for Seen {
    fn hidden(&mut self, index: usize, values: Vec<f32>) {
        assert_eq!(index, self.hidden.len());
        self.hidden.push(values);
    }

    fn topk(&mut self, layer: usize, ids: TopkIds) {
        self.topk.push((layer, ids));
    }
}

/// The largest absolute difference; infinite where anything is NaN.
fn difference(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    got.iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |max, d| if d.is_nan() { f32::INFINITY } else { max.max(d) })
}

fn argmax(logits: &[f32]) -> u32 {
    (1..logits.len()).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as u32
}

/// The tables of two sequences, each of which fits in a block.
const TABLES: [[u32; 1]; 2] = [[1], [0]];

/// Two sequences of `len` tokens from their beginning.
fn halves(len: usize) -> [Segment<'static>; 2] {
    TABLES.each_ref().map(|blocks| Segment { blocks, position: 0, len })
}

/// All rows' logits of one forward pass.
fn logits(model: &Model, ids: &[u32], segments: &[Segment<'_>], observer: Option<&mut dyn Observer>) -> Vec<f32> {
    let mut cache = model.cache(TABLES.len()).unwrap();
    let hidden = model.forward(&Batch { ids, segments }, &mut cache, observer).unwrap();
    model.logits(&hidden, &(0..ids.len()).collect::<Vec<_>>()).unwrap()
}

/// Both prompts in one batch: logits, every hidden state, the experts of every MoE layer.
fn check_forward(name: &str) {
    let (model, expected) = open(name);
    let ids = expected.tokens("input_ids");
    let len = ids.len() / 2;
    let segments = halves(len);
    let mut seen = Seen::default();
    let logits = logits(&model, &ids, &segments, Some(&mut seen));
    let off = difference(&logits, &expected.floats("logits"));
    assert!(off <= 2e-4, "logits differ by {off:e}");
    assert_eq!(seen.hidden.len(), model.config().layers.len() + 1);
    for (index, hidden) in seen.hidden.iter().enumerate() {
        let off = difference(hidden, &expected.floats(&format!("hidden.{index}")));
        assert!(off <= 2e-4, "hidden.{index} differs by {off:e}");
    }
    let layers: Vec<String> = seen.topk.iter().map(|(layer, _)| format!("topk.{layer}")).collect();
    let mut stored: Vec<&str> = expected.0.names().filter(|name| name.starts_with("topk.")).collect();
    stored.sort_unstable();
    assert_eq!(layers, stored);
    for ((_, chosen), layer) in seen.topk.iter().zip(&layers) {
        let mut ids: Vec<i64> = chosen.ids.iter().map(|id| i64::from(*id)).collect();
        ids.chunks_mut(chosen.topk).for_each(<[i64]>::sort_unstable);
        assert_eq!(ids, expected.ids(layer), "{layer}");
    }
}

/// What is counted on the way is what the stored choices give, layer by layer; sequences that are cut are sequences of their own.
fn check_usage(name: &str) {
    let (model, expected) = open(name);
    let ids = expected.tokens("input_ids");
    let texts: Vec<Vec<u32>> = ids.chunks(ids.len() / 2).map(<[u32]>::to_vec).collect();
    let mut passes = Vec::new();
    let mut count = |texts: &[Vec<u32>], context| {
        ExpertUsage::of_texts(&model, texts, context, &mut |done| {
            passes.push(done);
            Ok(())
        })
    };
    let Some(moe) = &model.config().moe else {
        assert!(count(&texts, 64).unwrap_err().to_string().contains("dense"));
        return;
    };
    let usage = count(&texts, 64).unwrap();
    assert_eq!((usage.tokens(), usage.sequences()), (48, 2));
    let layers: Vec<String> = usage.layers().keys().map(|layer| format!("topk.{layer}")).collect();
    let mut stored: Vec<&str> = expected.0.names().filter(|name| name.starts_with("topk.")).collect();
    stored.sort_unstable();
    assert_eq!(layers, stored);
    for (got, layer) in usage.layers().values().zip(&layers) {
        let mut counted = LayerUsage::new(moe.routing.num_experts());
        let ids = expected.ids(layer).iter().map(|id| *id as i32).collect();
        counted.add(&TopkIds { ids, topk: moe.routing.topk() }).unwrap();
        assert_eq!(*got, counted, "{layer}");
    }
    let cut = count(&texts, 9).unwrap();
    let pieces: Vec<Vec<u32>> = texts.iter().flat_map(|text| text.chunks(9)).map(<[u32]>::to_vec).collect();
    assert_eq!(cut, count(&pieces, 64).unwrap());
    assert_eq!(cut.sequences(), 6);
    assert!(count(&[vec![], vec![]], 64).unwrap_err().to_string().contains("no token"));
    assert!(count(&texts, 513).unwrap_err().to_string().contains("context of 513"));
    let uneven = usage.layers()[&usage.most_uneven().unwrap()].max_vio();
    assert!(usage.layers().values().all(|layer| layer.max_vio() <= uneven));
    assert_eq!(passes[..2], [0, 24]);
}

/// The router's own choice, given, changes nothing but the order of sums; another choice does, and a wrong one is refused.
fn check_given_routing(name: &str) {
    let (model, expected) = open(name);
    let Some(moe) = &model.config().moe else { return };
    let (topk, experts) = (moe.routing.topk(), moe.routing.num_experts() as i32);
    let ids = expected.tokens("input_ids");
    let len = ids.len() / 2;
    let segments = halves(len);
    let batch = Batch { ids: &ids, segments: &segments };
    let forward = |routing: &GivenRouting| {
        let hidden = model.forward_with(&batch, &mut model.cache(TABLES.len())?, None, routing)?;
        model.logits(&hidden, &(0..ids.len()).collect::<Vec<_>>())
    };
    let layers = (0..model.config().layers.len()).map(|layer| (layer, format!("topk.{layer}")));
    let mut routing: GivenRouting = layers
        .filter(|(_, name)| expected.0.names().any(|stored| stored == *name))
        .map(|(layer, name)| (layer, expected.ids(&name).iter().map(|id| *id as i32).collect()))
        .map(|(layer, ids)| (layer, TopkIds { ids, topk }))
        .collect();
    let off = difference(&forward(&routing).unwrap(), &expected.floats("logits"));
    assert!(off <= 2e-4, "logits differ by {off:e}");

    let given = routing.values_mut().next().unwrap();
    given.ids.iter_mut().for_each(|id| *id = (*id + 1) % experts);
    assert!(difference(&forward(&routing).unwrap(), &expected.floats("logits")) > 1e-2);
    routing.values_mut().next().unwrap().ids[0] = experts;
    assert!(forward(&routing).unwrap_err().to_string().starts_with(&format!("expert {experts} is given for layer")));
    routing.values_mut().next().unwrap().ids.pop();
    assert!(forward(&routing).unwrap_err().to_string().contains("tokens with"));
}

/// Sixteen tokens, each the likeliest, through the cache.
fn check_greedy(name: &str) {
    let (model, expected) = open(name);
    let greedy = expected.tokens("greedy");
    let mut tokens = greedy[..greedy.len() - 16].to_vec();
    let mut cache = model.cache(1).unwrap();
    let mut position = 0;
    while tokens.len() < greedy.len() {
        let segments = [Segment { blocks: &[0], position, len: tokens.len() - position }];
        let hidden = model.forward(&Batch { ids: &tokens[position..], segments: &segments }, &mut cache, None).unwrap();
        let last = segments[0].len - 1;
        position = tokens.len();
        tokens.push(argmax(&model.logits(&hidden, &[last]).unwrap()));
    }
    assert_eq!(tokens, greedy);
}

/// One pass over a prompt against the same prompt in pieces, beside another sequence that is rewound at every step.
fn check_incremental(name: &str) {
    let (model, expected) = open(name);
    let ids = expected.tokens("input_ids");
    let (prompt, other) = ids.split_at(ids.len() / 2);
    let one_pass = logits(&model, prompt, &[Segment { blocks: &TABLES[0], position: 0, len: prompt.len() }], None);
    for pieces in [vec![1; 24], vec![5, 1, 11, 7]] {
        let mut cache = model.cache(TABLES.len()).unwrap();
        let (mut position, mut pieced) = (0, Vec::new());
        for len in pieces {
            let beside = position.min(2);
            let segments = [
                Segment { blocks: &TABLES[0], position: beside, len: 2 },
                Segment { blocks: &TABLES[1], position, len },
            ];
            let ids = [&other[beside..beside + 2], &prompt[position..position + len]].concat();
            let hidden = model.forward(&Batch { ids: &ids, segments: &segments }, &mut cache, None).unwrap();
            pieced.extend(model.logits(&hidden, &(2..2 + len).collect::<Vec<_>>()).unwrap());
            position += len;
        }
        let off = difference(&pieced, &one_pass);
        assert!(off <= 5e-5, "incremental decoding differs by {off:e}");
    }
}

macro_rules! families {
    ($($test:ident: $name:literal),* $(,)?) => {
        $(mod $test {
            #[test]
            fn forward() { super::check_forward($name); }
            #[test]
            fn given_routing() { super::check_given_routing($name); }
            #[test]
            fn usage() { super::check_usage($name); }
            #[test]
            fn greedy() { super::check_greedy($name); }
            #[test]
            fn incremental() { super::check_incremental($name); }
        })*

        /// A folder that no test reads would be a hole.
        #[test]
        fn every_folder_is_checked() {
            let mut found: Vec<_> = std::fs::read_dir(folder("")).unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            found.sort();
            let mut checked = [$($name),*];
            checked.sort_unstable();
            assert_eq!(found, checked);
        }
    };
}

families! {
    deepseek_v1: "deepseek-v1",
    deepseek_v2: "deepseek-v2",
    deepseek_v2_lite: "deepseek-v2-lite",
    deepseek_v3: "deepseek-v3",
    deepseek_v3_fp8: "deepseek-v3-fp8",
    glm4_moe: "glm4-moe",
    llama: "llama",
    mixtral: "mixtral",
    olmoe: "olmoe",
    qwen2_moe: "qwen2-moe",
    qwen3_moe: "qwen3-moe",
}
