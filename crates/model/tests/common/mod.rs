//! The golden checkpoints' configurations, as they are and changed.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anabranch_model::{Config, Error};
use serde_json::Value;

pub(crate) const GOLDEN: [&str; 11] = [
    "deepseek-v1",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3",
    "deepseek-v3-fp8",
    "glm4-moe",
    "llama",
    "mixtral",
    "olmoe",
    "qwen2-moe",
    "qwen3-moe",
];

pub(crate) fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name)
}

pub(crate) fn golden_json(name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(folder(name).join("config.json")).unwrap()).unwrap()
}

pub(crate) fn read(value: &Value) -> Result<Config, Error> {
    Config::from_json(Path::new("config.json"), &value.to_string())
}

/// The golden configuration with fields replaced, or removed where there is no new value.
pub(crate) fn changed(name: &str, fields: &[(&str, Option<Value>)]) -> Value {
    let mut value = golden_json(name);
    let map = value.as_object_mut().unwrap();
    for (key, new) in fields {
        match new {
            Some(new) => map.insert((*key).to_owned(), new.clone()),
            None => map.shift_remove(*key),
        };
    }
    value
}
