//! candle-transformers' layer, by this library.

use anabranch::{Renormalize, Routing};
use candle_core::{DType, Module, Result, Tensor};
use candle_nn::{Activation, Linear, VarBuilder, linear_no_bias};
use candle_transformers::fused_moe::MoeCfg;

use crate::{
    layer::{Experts, moe_forward},
    tensors::wrapped,
};

/// A layer with its gate: softmax over all experts, the best of them, `SwiGLU`. It takes what
/// `candle_transformers::fused_moe::FusedMoe` takes, and reads the same tensors: `gate.weight`,
/// `experts.{i}.{gate,up,down}_proj.weight`.
#[derive(Debug, Clone)]
pub struct FusedMoe {
    gate: Linear,
    experts: Experts,
    routing: Routing,
}

impl FusedMoe {
    /// Reads and packs the weights: `cfg` and `vb` as candle's layer has them, `dtype` what the experts are computed in.
    ///
    /// # Errors
    /// If `dtype` or the variables are not bf16, the activation is not `SiLU`, a tensor is missing or has another shape, or
    /// the numbers of experts contradict each other.
    #[allow(clippy::needless_pass_by_value, reason = "candle's signature")]
    pub fn new(cfg: &MoeCfg, vb: VarBuilder, dtype: DType) -> Result<Self> {
        if dtype != DType::BF16 || vb.dtype() != DType::BF16 {
            let got = if dtype == DType::BF16 { vb.dtype() } else { dtype };
            candle_core::bail!("FusedMoe is computed in BF16, got {got:?}: load the model with DType::BF16");
        }
        if cfg.act != Activation::Silu {
            candle_core::bail!("FusedMoe's experts are SwiGLU, with Activation::Silu, got {:?}", cfg.act);
        }
        let renormalize = if cfg.norm_topk_prob { Renormalize::Sum } else { Renormalize::None };
        let routing = Routing::builder(cfg.num_experts, cfg.num_experts_per_tok).renormalize(renormalize).build();
        let (hidden, width) = (cfg.hidden_size, cfg.moe_intermediate_size);
        let gate = linear_no_bias(hidden, cfg.num_experts, vb.pp("gate"))?;
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for expert in 0..cfg.num_experts {
            let vb = vb.pp("experts").pp(expert);
            let first = vb.pp("gate_proj").get((width, hidden), "weight")?;
            let second = vb.pp("up_proj").get((width, hidden), "weight")?;
            gate_up.push(Tensor::cat(&[first, second], 0)?);
            down.push(vb.pp("down_proj").get((hidden, width), "weight")?);
        }
        let experts = Experts::new(Tensor::stack(&gate_up, 0)?, Tensor::stack(&down, 0)?)?;
        Ok(Self { gate, experts, routing: routing.map_err(wrapped)? })
    }

    /// `xs` `[batch, length, d]` bf16 to the same shape. Whether it is prefill makes no difference here.
    ///
    /// # Errors
    /// Those of [`moe_forward`].
    pub fn forward(&self, xs: &Tensor, _is_prefill: bool) -> Result<Tensor> {
        let (_, _, hidden) = xs.dims3()?;
        let x = xs.reshape(((), hidden))?.contiguous()?;
        let logits = self.gate.forward(&x)?.to_dtype(DType::F32)?;
        moe_forward(&x, &logits, &self.experts, &self.routing)?.reshape(xs.shape())
    }
}
