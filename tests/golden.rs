//! The reference against MoE layers that PyTorch computed in float64 (`tests/golden/generate_layer.py`).

#[path = "common/layers.rs"]
mod layers;

use anabranch::{
    Dtype,
    reference::{Activation, Expert, Linear, Matrix, MoeLayer},
};
use layers::{Golden, floats};
use safetensors::SafeTensors;

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
            let mut checked = [$(stringify!($name)),*];
            checked.sort_unstable();
            assert_eq!(layers::names(), checked);
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
