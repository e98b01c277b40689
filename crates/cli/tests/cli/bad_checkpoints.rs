//! Checkpoints that are damaged or lie: one sentence that says where, never a panic, and no output.

use crate::support::{Copy, run};
use serde_json::{Value, json};
use std::fs;

const SHARDS: &str = "deepseek-v3";
const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00002-of-00003.safetensors";

/// Damages a copy of a checkpoint and checks what `generate` says.
#[track_caller]
fn refused(family: &str, damage: impl FnOnce(&Copy), words: &[&str]) {
    let copy = Copy::of(family);
    damage(&copy);
    run(&["generate", "--model", copy.argument(), "--prompt", "a", "--max-new-tokens", "1"]).failure(1, words);
}

#[track_caller]
fn refused_config(family: &str, key: &str, value: Value, words: &[&str]) {
    refused(family, |copy| copy.edit("config.json", |json| json[key] = value), words);
}

/// The header of a safetensors file, changed.
fn edit_header(copy: &Copy, file: &str, change: impl FnOnce(&mut Value)) {
    let bytes = fs::read(copy.path(file)).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let header = header.to_string();
    let changed = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat();
    fs::write(copy.path(file), changed).unwrap();
}

#[test]
fn missing_and_truncated_files() {
    refused(SHARDS, |copy| fs::remove_file(copy.path(SHARD)).unwrap(), &[SHARD]);
    let truncate = |copy: &Copy| {
        let file = fs::File::options().write(true).open(copy.path(SHARD)).unwrap();
        file.set_len(file.metadata().unwrap().len() - 100).unwrap();
    };
    refused(SHARDS, truncate, &[SHARD]);
    refused(SHARDS, |copy| fs::write(copy.path(SHARD), "").unwrap(), &[SHARD]);
    refused("llama", |copy| fs::remove_file(copy.path("model.safetensors")).unwrap(), &["model.safetensors"]);
    refused("llama", |copy| fs::remove_file(copy.path("config.json")).unwrap(), &["config.json"]);
    refused("llama", |copy| fs::remove_file(copy.path("tokenizer.json")).unwrap(), &["tokenizer.json"]);
    refused("llama", |copy| fs::write(copy.path("tokenizer.json"), "{}").unwrap(), &["tokenizer.json"]);
}

#[test]
fn indexes_that_lie() {
    let weight = "model.layers.1.input_layernorm.weight";
    let point = |to: &'static str| move |copy: &Copy| copy.edit(INDEX, |json| json["weight_map"][weight] = to.into());
    refused(SHARDS, point("../outside.safetensors"), &["outside.safetensors"]);
    refused(SHARDS, point("/etc/passwd"), &["/etc/passwd"]);
    refused(SHARDS, point("absent.safetensors"), &["absent.safetensors"]);
    let invent = |copy: &Copy| copy.edit(INDEX, |json| json["weight_map"]["model.invented.weight"] = SHARD.into());
    refused(SHARDS, invent, &["model.invented.weight", SHARD]);
    let forget = |copy: &Copy| {
        copy.edit(INDEX, |json| drop(json["weight_map"].as_object_mut().unwrap().remove(weight)));
    };
    refused(SHARDS, forget, &[weight]);
    refused(SHARDS, |copy| fs::write(copy.path(INDEX), "[]").unwrap(), &[INDEX]);
}

#[test]
fn headers_that_lie() {
    let file = "model.safetensors";
    let weight = "model.norm.weight";
    let long = |copy: &Copy| {
        let mut bytes = fs::read(copy.path(file)).unwrap();
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        fs::write(copy.path(file), bytes).unwrap();
    };
    refused("llama", long, &[file, "header"]);
    let overlap = |copy: &Copy| {
        edit_header(copy, file, |header| {
            let other = header["model.embed_tokens.weight"]["data_offsets"].clone();
            header["lm_head.weight"]["data_offsets"] = other;
        });
    };
    refused("llama", overlap, &[file]);
    let reshape = |copy: &Copy| edit_header(copy, file, |header| header[weight]["shape"] = json!([8, 8]));
    refused("llama", reshape, &[weight, "[8, 8]", "[64]"]);
    let retype = |copy: &Copy| edit_header(copy, file, |header| header[weight]["dtype"] = "I16".into());
    refused("llama", retype, &[weight, "I16"]);
    let rename = |copy: &Copy| {
        edit_header(copy, file, |header| {
            let entry = header.as_object_mut().unwrap().remove(weight).unwrap();
            header["model.renamed.weight"] = entry;
        });
    };
    refused("llama", rename, &[weight]);
}

#[test]
fn configurations_that_contradict_themselves() {
    refused("llama", |copy| fs::write(copy.path("config.json"), "{").unwrap(), &["config.json"]);
    refused_config("llama", "model_type", json!("gpt2"), &["model_type", "gpt2"]);
    refused_config("mixtral", "num_local_experts", json!(0), &["num_local_experts"]);
    refused_config("mixtral", "num_experts_per_tok", json!(9), &["9"]);
    refused_config("deepseek-v3", "n_group", json!(3), &["n_group"]);
    for size in [json!(-64), json!("64"), json!(1.5), json!(1e300), json!(u64::MAX), json!(null), json!([])] {
        refused_config("llama", "hidden_size", size, &["hidden_size"]);
    }
    refused_config("llama", "num_attention_heads", json!(0), &["num_attention_heads"]);
    refused_config("llama", "vocab_size", json!(1_000), &["model.embed_tokens.weight"]);
}
