//! Any bytes as `model.safetensors.index.json`: an index whose files stay in their folder, or an error.

#![no_main]

use std::path::{Component, Path};

use anabranch_model::checkpoint::Index;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match Index::from_json(Path::new("fuzz"), bytes) {
        Ok(index) => {
            for file in index.weight_map.values() {
                let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
                assert!(!file.is_empty() && Path::new(file).components().all(inside), "{file:?} leaves the folder");
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
