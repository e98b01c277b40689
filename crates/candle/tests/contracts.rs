//! What is refused, in candle's errors. No GPU is needed.

mod support;

use anabranch_candle::{Experts, FusedMoe, Routing, moe_forward};
use candle_core::{DType, Device, Result, Tensor};
use candle_nn::Activation;
use support::Sizes;

const SIZES: Sizes = Sizes { experts: 4, topk: 2, hidden: 16, width: 8 };

fn zeros<S: Into<candle_core::Shape>>(shape: S) -> Tensor {
    Tensor::zeros(shape, DType::BF16, &Device::Cpu).unwrap()
}

fn refused<T>(result: Result<T>, words: &str) {
    let message = result.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(message.contains(words), "{message:?} does not say {words:?}");
}

#[test]
fn weights_that_contradict_each_other() {
    refused(Experts::new(zeros((4, 24, 16)), zeros((4, 16, 8))), "gate_up must have shape [4, 16, 16]");
}

#[test]
fn tensors_of_another_device() {
    let experts = Experts::new(zeros((4, 16, 16)), zeros((4, 16, 8))).unwrap();
    let routing = Routing::builder(4, 2).build().unwrap();
    let logits = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
    refused(moe_forward(&zeros((3, 16)), &logits, &experts, &routing), "x must be on a CUDA device");
}

#[test]
fn layers_that_have_no_kernels() {
    let weights = |dtype| SIZES.weights(dtype, &Device::Cpu).unwrap();
    refused(FusedMoe::new(&SIZES.config(true), weights(DType::F16), DType::F16), "computed in BF16, got F16");
    refused(FusedMoe::new(&SIZES.config(true), weights(DType::F32), DType::BF16), "computed in BF16, got F32");
    let mut config = SIZES.config(true);
    config.act = Activation::Gelu;
    refused(FusedMoe::new(&config, weights(DType::BF16), DType::BF16), "Activation::Silu, got Gelu");
    config.act = Activation::Silu;
    config.num_experts_per_tok = 5;
    refused(FusedMoe::new(&config, weights(DType::BF16), DType::BF16), "topk must be 1 to 4 with 4 experts, got 5");
}
