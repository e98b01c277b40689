//! Any bytes as a safetensors file: tensors that can all be read, and the same that the `safetensors` crate finds; or an
//! error.

#![no_main]

use std::path::Path;

use anabranch_model::TensorFile;
use libfuzzer_sys::fuzz_target;
use safetensors::{SafeTensorError, SafeTensors};

fuzz_target!(|bytes: &[u8]| {
    let theirs = SafeTensors::deserialize(bytes);
    match TensorFile::from_bytes(Path::new("fuzz"), bytes.to_vec()) {
        Ok(file) => {
            for name in file.names() {
                let tensor = file.get(name).expect("a listed name is found");
                let elements = tensor.shape().iter().product::<usize>();
                if let Ok(values) = tensor.to_f32() {
                    assert_eq!(values.len(), elements);
                }
                if let Ok(values) = tensor.to_i64() {
                    assert_eq!(values.len(), elements);
                }
            }
            match theirs {
                Ok(theirs) => {
                    assert_eq!(theirs.len(), file.names().count());
                    for (name, view) in theirs.iter() {
                        let tensor = file.get(name).expect("a tensor that the crate finds");
                        assert_eq!((tensor.dtype(), tensor.shape()), (view.dtype(), view.shape()));
                        assert_eq!(tensor.bytes(), view.data());
                    }
                }
                // The crate also parses the fields that a header should not have; here they are skipped.
                Err(SafeTensorError::InvalidHeaderDeserialization(_)) => {}
                Err(error) => panic!("read what the safetensors crate refuses: {error}"),
            }
        }
        // The crate keeps the last of two tensors of one name.
        Err(error) => assert!(theirs.is_err() || error.to_string().contains("listed twice"), "refused: {error}"),
    }
});
