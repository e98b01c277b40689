//! Random layers.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::fused_moe::MoeCfg;

/// E experts, K a token, d and n.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub experts: usize,
    pub topk: usize,
    pub hidden: usize,
    pub width: usize,
}

impl Sizes {
    pub fn config(self, norm_topk_prob: bool) -> MoeCfg {
        MoeCfg {
            hidden_size: self.hidden,
            num_experts: self.experts,
            num_experts_per_tok: self.topk,
            moe_intermediate_size: self.width,
            norm_topk_prob,
            act: Activation::Silu,
            decoder_sparse_step: None,
        }
    }

    /// Weights under the names that candle's layer reads.
    pub fn weights(self, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
        let noise = |rows: usize, columns: usize, size: f32| {
            Tensor::randn(0_f32, size, (rows, columns), device)?.to_dtype(dtype)
        };
        let mut tensors = HashMap::new();
        tensors.insert("gate.weight".to_owned(), noise(self.experts, self.hidden, 0.1)?);
        for expert in 0..self.experts {
            let mut insert =
                |part: &str, weight| tensors.insert(format!("experts.{expert}.{part}_proj.weight"), weight);
            insert("gate", noise(self.width, self.hidden, 0.1)?);
            insert("up", noise(self.width, self.hidden, 0.1)?);
            insert("down", noise(self.hidden, self.width, 0.1)?);
        }
        Ok(VarBuilder::from_tensors(tensors, dtype, device))
    }
}
