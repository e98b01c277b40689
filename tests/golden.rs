//! The reference against MoE layers that PyTorch computed in float64 (tests/golden/generate_layer.py).

use std::{fs, path::Path};

use anabranch::{
    Adaptive, Capacity, Dtype, GroupLimit, GroupScore, Renormalize, Routing, Score,
    reference::{Activation, Expert, Linear, Matrix, MoeLayer},
};
use safetensors::SafeTensors;
use serde_json::Value;

/// One file of tests/golden/layers.
struct Golden {
    bytes: Vec<u8>,
    case: Value,
}

impl Golden {
    fn open(name: &str) -> Self {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/layers").join(name).with_extension("safetensors");
        let bytes = fs::read(path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let case = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["case"]).unwrap();
        Self { bytes, case }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap()
    }

    fn size(&self, key: &str) -> usize {
        self.case[key].as_u64().unwrap() as usize
    }

    fn routing(&self) -> Routing {
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
fn floats(tensors: &SafeTensors<'_>, name: &str) -> Option<Vec<f32>> {
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

/// The `index`-th matrix of a stack `[E, rows, columns]` of bfloat16.
fn stacked<'a>(tensors: &SafeTensors<'a>, name: &str, index: usize) -> Matrix<'a> {
    let tensor = tensors.tensor(name).unwrap();
    let [_, rows, columns] = tensor.shape().try_into().unwrap();
    let size = rows * columns * 2;
    Matrix::new(Dtype::Bf16, rows, columns, &tensor.data()[index * size..(index + 1) * size]).unwrap()
}

/// `||got - expected|| / ||expected||`; NaN where anything is NaN.
fn error(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut expected.iter().map(|v| f64::from(*v)))
}

fn check(name: &str) {
    let golden = Golden::open(name);
    let tensors = golden.tensors();
    let (d, num_experts) = (golden.size("d"), golden.size("E"));
    let input = |name: &str| floats(&tensors, name);
    let (up_biases, down_biases) = (input("b_up").unwrap_or_default(), input("b_down").unwrap_or_default());
    let n = golden.size("n");
    let experts = (0..num_experts)
        .map(|e| match golden.case["expert"].as_str() {
            None => Expert::swiglu_stacked(stacked(&tensors, "w_gate_up", e), stacked(&tensors, "w_down", e)).unwrap(),
            Some(kind) => Expert::Plain {
                activation: if kind == "gelu_mlp" { Activation::Gelu } else { Activation::Relu },
                up: Linear { weight: stacked(&tensors, "w_up", e), bias: Some(&up_biases[e * n..(e + 1) * n]) },
                down: Linear { weight: stacked(&tensors, "w_down", e), bias: Some(&down_biases[e * d..(e + 1) * d]) },
            },
        })
        .collect();
    let gate_bias = input("gate_b");
    let selection_bias = input("bias");
    let gate = Matrix::new(Dtype::Bf16, num_experts, d, tensors.tensor("gate_w").unwrap().data()).unwrap();
    let layer = MoeLayer {
        routing: golden.routing(),
        gate: Linear { weight: gate, bias: gate_bias.as_deref() },
        selection_bias: selection_bias.as_deref(),
        experts,
        shared: None,
    };
    let out = layer.forward(&input("x").unwrap(), input("complexity").as_deref()).unwrap();

    let (ids, _) = tensors.tensor("topk_idx").unwrap().data().as_chunks();
    let size = tensors.tensor("topk_idx").unwrap().dtype().bitsize() / 8;
    assert_eq!(size, 4, "topk_idx is int32");
    let ids: Vec<i32> = ids.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
    assert_eq!(out.routing.topk_ids, ids);
    let load: Vec<u32> = input("load").unwrap().iter().map(|count| *count as u32).collect();
    assert_eq!(out.routing.expert_counts, load);
    for (what, got, expected) in [
        ("logits", &out.logits, input("logits")),
        ("topk_weights", &out.routing.topk_weights, input("topk_w")),
        ("y", &out.y, input("y")),
    ] {
        let error = error(got, &expected.unwrap());
        assert!(error <= 1e-6, "{what} differs by {error:e}");
    }
}

macro_rules! layers {
    ($($name:ident),*) => {
        $(#[test] fn $name() { check(stringify!($name)); })*

        /// A file that no test reads would be a hole.
        #[test]
        fn every_file_is_checked() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/layers");
            let mut found: Vec<_> = fs::read_dir(folder).unwrap()
                .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect();
            found.sort();
            let mut checked = [$(stringify!($name)),*];
            checked.sort_unstable();
            assert_eq!(found, checked);
        }
    };
}

layers!(
    softmax,
    softmax_norm,
    topk_softmax,
    sigmoid_bias_group,
    softmax_group_max,
    gshard_top2,
    switch_top1,
    adaptive_topk,
    adaptive_entropy,
    negative_bias,
    gelu_mlp,
    relu_mlp_switch,
    one_token,
    all_to_one
);
