//! `anabranch init`.

use crate::support::{golden, golden_argument, run};
use serde_json::Value;
use std::{fs, path::Path};

fn init(config: &str, out: &Path, more: &[&str]) -> crate::support::Run {
    run(&[&["init", "--config", config, "--out", out.to_str().unwrap()], more].concat())
}

fn files(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_it_makes_runs() {
    let folder = tempfile::tempdir().unwrap();
    for family in ["deepseek-v3-fp8", "qwen2-moe"] {
        let out = folder.path().join(family);
        let said =
            init(golden("").join(family).join("config.json").to_str().unwrap(), &out, &["--seed", "3"]).success();
        assert!(said.contains(family) && said.contains("random weights"), "{said}");
        let out = out.to_str().unwrap();
        let text = run(&["generate", "--model", out, "--prompt", "a", "--max-new-tokens", "3"]).success();
        assert!(text.ends_with('\n'), "{text:?}");
    }
}

#[test]
fn the_seed_decides_and_the_shards_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let made = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        init(&golden_argument("olmoe"), &out, more).success();
        let out = out.to_str().unwrap().to_owned();
        run(&["generate", "--model", &out, "--prompt", "abc", "--max-new-tokens", "16"]).success()
    };
    let text = made("whole", &["--seed", "1"]);
    assert_eq!(text, made("sharded", &["--seed", "1", "--shard-size", "20K"]));
    assert_ne!(text, made("other", &["--seed", "2"]));
    assert!(folder.path().join("sharded/model.safetensors.index.json").exists());
    assert!(folder.path().join("whole/model.safetensors").exists());
}

#[test]
fn the_dtype_is_stored() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = |name: &str, more: &[&str]| {
        let out = folder.path().join(name);
        init(&golden_argument("mixtral"), &out, more).success();
        let text = run(&["inspect", "--json", "--model", out.to_str().unwrap()]).success();
        let report: Value = serde_json::from_str(&text).unwrap();
        report["weight_bytes"].as_u64().unwrap()
    };
    assert_eq!(bytes("f32", &["--dtype", "f32"]), 2 * bytes("bf16", &["--dtype", "bf16"]));
    assert_eq!(bytes("same", &[]), bytes("f16", &["--dtype", "f16"]));
}

#[test]
fn what_is_refused_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    init("no-such-model", &out, &[]).failure(1, &["no-such-model", "olmoe-1b-7b"]);
    let config = folder.path().join("config.json");
    fs::write(&config, r#"{"model_type": "gpt2"}"#).unwrap();
    init(config.to_str().unwrap(), &out, &[]).failure(1, &["model_type", "gpt2"]);
    fs::write(&config, b"\xff").unwrap();
    init(config.to_str().unwrap(), &out, &[]).failure(1, &["config.json"]);
    init("olmoe-1b-7b", &out, &["--dtype", "fp4"]).failure(2, &["fp4"]);
    assert_eq!(files(folder.path()), ["config.json"]);
    init(&golden_argument("llama"), folder.path(), &[]).failure(1, &["not empty"]);
    assert_eq!(files(folder.path()), ["config.json"]);
}

#[test]
#[cfg(unix)]
fn more_than_the_disk_holds_is_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    // More than any disk that a test runs on.
    let config = folder.path().join("config.json");
    let mut json: Value = serde_json::from_slice(&fs::read(golden("llama").join("config.json")).unwrap()).unwrap();
    json["num_hidden_layers"] = 1000.into();
    json["hidden_size"] = (1 << 16).into();
    json["intermediate_size"] = (1 << 18).into();
    fs::write(&config, json.to_string()).unwrap();
    init(config.to_str().unwrap(), &folder.path().join("out"), &["--dtype", "f32"])
        .failure(1, &["TiB of disk space", "--out"]);
    assert_eq!(files(folder.path()), ["config.json"]);
}
