//! `anabranch inspect`.

use crate::support::{golden, run};
use serde_json::Value;
use std::fs;

fn json(arguments: &[&str]) -> Value {
    let text = run(&[&["inspect", "--json", "--model"], arguments].concat()).success();
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

#[test]
fn counts_the_published_models() {
    for (preset, total) in [
        ("deepseek-moe-16b", 16_375_728_128_u64),
        ("deepseek-v2-lite", 15_706_484_224),
        ("deepseek-v3", 671_026_419_200),
    ] {
        assert_eq!(json(&[preset])["total_parameters"], total, "{preset}");
    }
    assert_eq!(json(&["deepseek-moe-16b"])["active_parameters"], 2_828_650_496_u64);
}

#[test]
fn compares_by_the_papers_formula() {
    let text = run(&["inspect", "--model", "deepseek-moe-16b", "--versus", "llama-2-7b"]).success();
    assert!(text.contains("74.4T against 187.9T FLOPs, 39.6%"), "{text}");
    let report = json(&["deepseek-moe-16b", "--versus", "llama-2-7b"]);
    assert_eq!(report["versus"]["name"], "llama-2-7b");
    let ratio = report["comparison"]["ratio"].as_f64().unwrap();
    assert!((ratio - 0.396).abs() < 5e-4, "{ratio}");
}

#[test]
fn parts_add_up_to_the_total() {
    let report = json(&["qwen3-30b-a3b"]);
    let parts = report["parts"].as_array().unwrap();
    let sum = |key: &str| parts.iter().map(|part| part[key].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum("parameters"), report["total_parameters"].as_u64().unwrap());
    assert_eq!(sum("active_parameters"), report["active_parameters"].as_u64().unwrap());
    assert_eq!(sum("bytes"), report["weight_bytes"].as_u64().unwrap());
}

#[test]
fn context_and_cache_dtype_decide_the_memory() {
    let memory = |arguments: &[&str]| {
        let report = json(&[&["deepseek-v3"], arguments].concat());
        (report["cache"]["bytes"].as_u64().unwrap(), report["forward"]["context"].as_u64().unwrap())
    };
    // 61 layers of 512 + 64 numbers.
    assert_eq!(memory(&["--context", "1000"]), (1000 * 61 * 576 * 2, 1000));
    assert_eq!(memory(&["--context", "1000", "--cache-dtype", "f32"]), (1000 * 61 * 576 * 4, 1000));
    assert_eq!(memory(&[]).1, 4096);
}

#[test]
fn the_table_has_units_and_exact_numbers() {
    let text = run(&["inspect", "--model", "deepseek-v3"]).success();
    for words in [
        "671.0B (671,026,419,200)",
        "8 of 256, each 2048 wide",
        "sigmoid, selection bias, 4 of 8 groups by top2 sum",
        "61, 58 of them with experts",
    ] {
        assert!(text.contains(words), "{words:?} in {text}");
    }
    let dense = run(&["inspect", "--model", "llama-2-7b"]).success();
    assert!(dense.contains("all dense") && !dense.contains("routed experts"), "{dense}");
}

#[test]
fn needs_no_weights() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(golden("mixtral").join("config.json"), folder.path().join("config.json")).unwrap();
    let report = json(&[folder.path().to_str().unwrap()]);
    assert_eq!(report["model_type"], "mixtral");
    let file = folder.path().join("config.json");
    assert_eq!(json(&[file.to_str().unwrap()])["total_parameters"], report["total_parameters"]);
}

#[test]
fn refuses_what_is_no_model() {
    run(&["inspect", "--model", "no-such-model"]).failure(1, &["no-such-model", "deepseek-v3"]);
    run(&["inspect", "--model", "deepseek-v3", "--versus", "nothing"]).failure(1, &["nothing"]);
    run(&["inspect"]).failure(2, &["required"]);
    run(&["inspect", "--model", "deepseek-v3", "--context", "0"]).failure(2, &["--context", "at least 1"]);
}
