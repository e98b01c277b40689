//! Random checkpoints: what is in the folder, the same for the same seed, and all or nothing.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anabranch::Dtype;
use anabranch_model::{
    Checkpoint, Config, Error, Result,
    init::{InitOptions, init},
};
use tempfile::TempDir;

fn golden(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(model).join("config.json")
}

fn make(model: &str, out: &Path, options: &InitOptions) -> Result<()> {
    let path = golden(model);
    init(&path, &fs::read_to_string(&path).unwrap(), out, options, &mut |_, _| Ok(()))
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |path: PathBuf| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap());
    fs::read_dir(dir).unwrap().map(|entry| read(entry.unwrap().path())).collect()
}

fn tensors(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.names().map(|name| (name.to_owned(), checkpoint.get(name).unwrap().bytes().to_vec())).collect()
}

fn new_folder() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("made/here");
    (dir, out)
}

#[test]
fn every_golden_architecture_has_exactly_its_tensors() {
    let mut models = 0;
    for entry in fs::read_dir(golden("").parent().unwrap()).unwrap() {
        let model = entry.unwrap().file_name().into_string().unwrap();
        let (_dir, out) = new_folder();
        make(&model, &out, &InitOptions::default()).unwrap();
        let config = Config::from_dir(&out).unwrap();
        assert_eq!(config, Config::from_dir(golden(&model).parent().unwrap()).unwrap(), "{model}");
        let checkpoint = Checkpoint::open(&out).unwrap();
        let golden = Checkpoint::open(golden(&model).parent().unwrap()).unwrap();
        // Multi-token-prediction layers follow the last layer and are no part of the main model.
        let mtp = format!("model.layers.{}.", config.layers.len());
        let main_model = || golden.names().filter(|name| !name.starts_with(&mtp));
        assert!(checkpoint.names().eq(main_model()), "{model}");
        for name in main_model() {
            let (made, given) = (checkpoint.get(name).unwrap(), golden.get(name).unwrap());
            made.expect_shape(given.shape()).unwrap();
            assert_eq!(made.dtype(), given.dtype(), "{model} {name}");
            assert!(made.to_f32().unwrap().iter().all(|value| value.is_finite()), "{model} {name}");
        }
        models += 1;
    }
    assert!(models >= 10, "{models}");
}

#[test]
fn the_same_seed_gives_the_same_values_however_sharded() {
    let (_dir, whole) = new_folder();
    make("mixtral", &whole, &InitOptions { seed: 7, ..Default::default() }).unwrap();
    let (_dir2, sharded) = new_folder();
    make("mixtral", &sharded, &InitOptions { seed: 7, shard_bytes: 100_000, ..Default::default() }).unwrap();
    let (_dir3, other) = new_folder();
    make("mixtral", &other, &InitOptions { seed: 8, ..Default::default() }).unwrap();

    assert!(whole.join("model.safetensors").is_file() && !whole.join("model.safetensors.index.json").exists());
    let names: Vec<_> = files(&sharded).into_keys().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(names.len() > 3, "{names:?}");
    assert_eq!(names[0], format!("model-00001-of-{:05}.safetensors", names.len()));
    for (name, bytes) in files(&sharded) {
        assert!(!name.ends_with(".safetensors") || bytes.len() < 120_000, "{name}: {} bytes", bytes.len());
    }
    let index: serde_json::Value =
        serde_json::from_slice(&fs::read(sharded.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], Checkpoint::open(&whole).unwrap().total_bytes());

    assert_eq!(tensors(&whole), tensors(&sharded));
    let (a, b) = (tensors(&whole), tensors(&other));
    assert!(a.iter().all(|(name, bytes)| bytes != &b[name]), "another seed gives other values");
    let distinct: std::collections::HashSet<_> = a.values().collect();
    assert_eq!(distinct.len(), a.len(), "every tensor has values of its own");
}

#[test]
fn values_have_the_documented_spread() {
    let (_dir, out) = new_folder();
    make("deepseek-v3-fp8", &out, &InitOptions::default()).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let moments = |values: &[f32]| {
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        (mean, (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt())
    };
    let close = |got: (f32, f32), mean: f32, spread: f32| {
        assert!(
            (got.0 - mean).abs() < 0.25 * spread && (got.1 / spread - 1.0).abs() < 0.25,
            "{got:?}, {mean}, {spread}"
        );
    };
    let values = |name: &str| checkpoint.get(name).unwrap().to_f32().unwrap();
    let width = checkpoint.get("model.norm.weight").unwrap().shape()[0] as f32;
    close(moments(&values("model.norm.weight")), 1.0, 0.1);
    close(moments(&values("model.embed_tokens.weight")), 0.0, 0.64 / width.sqrt());
    close(moments(&values("model.layers.1.mlp.gate.weight")), 0.0, 2.4 / width.sqrt());
    // Codes times scales: the same spread as a matrix that is not quantised.
    let weight = values("model.layers.0.mlp.gate_proj.weight");
    let scales = values("model.layers.0.mlp.gate_proj.weight_scale_inv");
    let scale = scales.iter().sum::<f32>() / scales.len() as f32;
    let dequantised: Vec<f32> = weight.iter().map(|code| code * scale).collect();
    close(moments(&dequantised), 0.0, 0.64 / width.sqrt());
    assert!(scales.windows(2).all(|pair| pair[0] != pair[1]), "blocks differ, so that a wrong block is seen");
    let bias = checkpoint.get("model.layers.1.mlp.gate.e_score_correction_bias").unwrap();
    assert_eq!(bias.dtype(), safetensors::Dtype::F32);
    assert!(bias.to_f32().unwrap().iter().any(|&value| value.to_bits() & 0xffff != 0), "finer than bf16");
}

#[test]
fn another_data_type_drops_the_quantisation() {
    for (dtype, stored, name) in [
        (Dtype::F32, safetensors::Dtype::F32, "float32"),
        (Dtype::F16, safetensors::Dtype::F16, "float16"),
        (Dtype::Bf16, safetensors::Dtype::BF16, "bfloat16"),
    ] {
        let (_dir, out) = new_folder();
        make("deepseek-v3-fp8", &out, &InitOptions { dtype: Some(dtype), ..Default::default() }).unwrap();
        let config = Config::from_dir(&out).unwrap();
        assert_eq!((config.dtype, config.fp8_block), (dtype, None));
        let json: serde_json::Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(json["torch_dtype"], name);
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_eq!(checkpoint.get("model.layers.0.mlp.gate_proj.weight").unwrap().dtype(), stored);
        assert!(checkpoint.names().all(|name| !name.ends_with("scale_inv")));
    }
    let (_dir, out) = new_folder();
    let error = make("mixtral", &out, &InitOptions { dtype: Some(Dtype::F8E4m3), ..Default::default() }).unwrap_err();
    assert!(matches!(&error, Error::Input(text) if text.contains("f8_e4m3")), "{error}");
    assert!(!out.exists());
}

#[test]
fn the_tokenizer_encodes_bytes_and_shows_every_token() {
    let (_dir, out) = new_folder();
    make("llama", &out, &InitOptions::default()).unwrap();
    let tokenizer = tokenizers::Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), 512);
    let text = "Grüße, 世界!\n\t<eos> \u{0}\u{7f}\u{ad}";
    let ids = tokenizer.encode_fast(text, false).unwrap().get_ids().to_vec();
    assert!(ids.contains(&1), "<eos> is one token: {ids:?}");
    assert_eq!(ids.len(), text.len() - "<eos>".len() + 1);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    // Every id has a text of its own, so whatever a model chooses can be seen.
    let texts: std::collections::HashSet<_> = (0..512).map(|id| tokenizer.id_to_token(id).unwrap()).collect();
    assert_eq!(texts.len(), 512);
}

#[test]
fn nothing_is_overwritten_and_nothing_half_written_stays() {
    let (dir, out) = new_folder();
    fs::create_dir_all(&out).unwrap();
    make("llama", &out, &InitOptions::default()).unwrap();
    let before = files(&out);
    let text = make("llama", &out, &InitOptions::default()).unwrap_err().to_string();
    assert!(text.contains("is not empty"), "{text}");
    assert_eq!(files(&out), before);
    let text = make("llama", &out.join("config.json"), &InitOptions::default()).unwrap_err().to_string();
    assert!(text.contains("is not a folder"), "{text}");

    let path = golden("llama");
    let json = fs::read_to_string(&path).unwrap();
    let mut calls = 0;
    let stopped = init(&path, &json, &out.with_file_name("stopped"), &InitOptions::default(), &mut |done, total| {
        calls += 1;
        assert!(done <= total);
        if calls > 3 { Err(Error::Interrupted) } else { Ok(()) }
    });
    assert!(matches!(stopped, Err(Error::Interrupted)) && calls == 4);
    for wrong in ["", "[]", "{}", r#"{"model_type": "nonsense"}"#] {
        let error = init(&path, wrong, &out.with_file_name("wrong"), &InitOptions::default(), &mut |_, _| Ok(()));
        assert!(matches!(error, Err(Error::Config { .. })), "{error:?}");
    }
    let left = fs::read_dir(dir.path().join("made")).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["here"]);
}
