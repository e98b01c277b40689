//! Any bytes as `config.json`: a configuration that can be described and listed, or an error.

#![no_main]

use std::path::Path;

use anabranch_model::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Config::from_json(Path::new("fuzz"), text) {
        Ok(config) => {
            // Listing takes memory for each tensor; what is too long to list is still counted.
            if config.tensor_count() <= 20_000 {
                let tensors = config.tensors();
                assert_eq!(tensors.len(), config.tensor_count());
                for tensor in tensors {
                    let elements = tensor.shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
                    assert!(elements.is_some_and(|elements| elements > 0), "{} {:?}", tensor.name, tensor.shape);
                }
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
