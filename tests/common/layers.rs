//! The golden layers, which `tests/golden/generate_layer.py` made, for the reference's tests and the GPU's.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anabranch::{Adaptive, Capacity, Dtype, GroupLimit, GroupScore, Renormalize, Routing, Score, reference::Matrix};
use safetensors::SafeTensors;
use serde_json::Value;

/// The golden data: in the checkout, or where `ANABRANCH_GOLDEN` says on a machine that has none.
fn folder() -> PathBuf {
    let elsewhere = env::var_os("ANABRANCH_GOLDEN").filter(|path| !path.is_empty()).map(PathBuf::from);
    elsewhere.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"))
}

/// The names of all golden layers, sorted.
pub(crate) fn names() -> Vec<String> {
    let files = fs::read_dir(folder().join("layers")).unwrap();
    let mut names: Vec<String> =
        files.map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// One file of tests/golden/layers.
pub(crate) struct Golden {
    bytes: Vec<u8>,
    /// The case as the generator describes it.
    pub(crate) case: Value,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let path = folder().join("layers").join(name).with_extension("safetensors");
        let bytes = fs::read(path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let case = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["case"]).unwrap();
        Self { bytes, case }
    }

    pub(crate) fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    pub(crate) fn size(&self, key: &str) -> usize {
        self.case[key].as_u64().unwrap() as usize
    }

    pub(crate) fn routing(&self) -> Routing {
        let case = &self.case;
        let text = |key: &str| case[key].as_str();
        let mut routing = Routing::builder(self.size("E"), self.size("K")).score(match text("score").unwrap() {
            "softmax" => Score::Softmax,
            "sigmoid" => Score::Sigmoid,
            "topk_softmax" => Score::TopkSoftmax,
            other => panic!("unknown score {other}"),
        });
        if case["norm"].as_bool() == Some(true) {
            routing = routing.renormalize(Renormalize::Sum);
        }
        if let Some(scale) = case["scale"].as_f64() {
            routing = routing.scale(scale as f32);
        }
        if case["n_group"].is_u64() {
            let score = if text("group_score") == Some("top2") { GroupScore::Top2Sum } else { GroupScore::Max };
            let (n_group, topk_group) = (self.size("n_group"), self.size("topk_group"));
            routing = routing.group_limit(GroupLimit { n_group, topk_group, score });
        }
        if let Some(factor) = case["capacity_factor"].as_f64() {
            routing = routing.capacity(Capacity::Factor(factor));
        }
        routing = match text("adaptive") {
            Some("given") => routing.adaptive(Adaptive::Complexity),
            Some("entropy") => routing.adaptive(Adaptive::Entropy),
            _ => routing,
        };
        routing.build().unwrap()
    }
}

/// `count` values of a tensor, whatever its shape and stored type.
pub(crate) fn floats(tensors: &SafeTensors<'_>, name: &str) -> Option<Vec<f32>> {
    let tensor = tensors.tensor(name).ok()?;
    let dtype = match tensor.dtype() {
        safetensors::Dtype::BF16 => Dtype::Bf16,
        safetensors::Dtype::F32 => Dtype::F32,
        safetensors::Dtype::F64 => {
            let (values, _) = tensor.data().as_chunks();
            return Some(values.iter().map(|bytes| f64::from_le_bytes(*bytes) as f32).collect());
        }
        other => panic!("{name} is {other:?}"),
    };
    let count = tensor.shape().iter().product();
    Some(Matrix::new(dtype, 1, count, tensor.data()).unwrap().to_vec())
}
