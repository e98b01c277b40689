//! A checkpoint's tensors, gathered into the parts that a backend loads whole.

use crate::{
    Checkpoint, Config, Error, Result, Tensor,
    config::{Attention, FeedForward, QkNorm},
};

/// A stored weight `[out, in]`, with what belongs to it.
#[derive(Debug, Clone)]
pub struct StoredLinear {
    /// The weight.
    pub weight: Tensor,
    /// Float32 scales of the weight's blocks, and the blocks' size; for FP8 only.
    pub scales: Option<(Tensor, [usize; 2])>,
    /// `[out]`, widened to float32.
    pub bias: Option<Vec<f32>>,
}

/// The weights of one attention.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum AttentionWeights {
    /// Multi-head and grouped-query attention.
    Grouped {
        /// Projection to queries.
        q: StoredLinear,
        /// Projection to keys.
        k: StoredLinear,
        /// Projection to values.
        v: StoredLinear,
        /// Projection back to the residual stream.
        o: StoredLinear,
        /// Norm weights of queries and keys.
        qk_norm: Option<[Vec<f32>; 2]>,
    },
    /// Multi-head latent attention.
    Latent {
        /// Down projection of the queries and its norm's weight, if the queries have one.
        q_a: Option<(StoredLinear, Vec<f32>)>,
        /// Projection to the queries, from the down projection or directly.
        q: StoredLinear,
        /// Projection to the latent and the shared key.
        kv_a: StoredLinear,
        /// Norm weight of the latent.
        kv_a_norm: Vec<f32>,
        /// Projection of the latent to keys and values.
        kv_b: StoredLinear,
        /// Projection back to the residual stream.
        o: StoredLinear,
    },
}

/// The weights of one SwiGLU.
#[derive(Debug, Clone)]
pub struct SwiGluWeights {
    /// `[n, d]`.
    pub gate: StoredLinear,
    /// `[n, d]`.
    pub up: StoredLinear,
    /// `[d, n]`.
    pub down: StoredLinear,
}

/// The weights of a layer's feed-forward part.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum FeedForwardWeights {
    /// One SwiGLU.
    Dense(SwiGluWeights),
    /// Routed experts, and shared ones where the model has them.
    Moe {
        /// The router's gate `[E, d]`.
        gate: StoredLinear,
        /// `[E]`, float32 whatever the checkpoint stores.
        selection_bias: Option<Vec<f32>>,
        /// E of them.
        experts: Vec<SwiGluWeights>,
        /// The shared experts as one, and their gate `[1, d]`.
        shared: Option<(SwiGluWeights, Option<StoredLinear>)>,
    },
}

/// Finds a model's weights in a checkpoint and checks every shape.
pub(crate) struct Weights<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) config: &'a Config,
}

impl Weights<'_> {
    /// A tensor of this shape.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.checkpoint.get(name)?;
        tensor.expect_shape(shape)?;
        Ok(tensor)
    }

    /// A norm's weight, a bias.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.tensor(name, &[len])?.to_f32()
    }

    /// A matrix of weights, with its scales if it is FP8.
    pub(crate) fn matrix(&self, name: &str, [out, inner]: [usize; 2]) -> Result<StoredLinear> {
        let weight = self.tensor(name, &[out, inner])?;
        let scales = if weight.weight_dtype()? == anabranch::Dtype::F8E4m3 {
            let block = self.config.fp8_block.ok_or_else(|| Error::Checkpoint {
                path: weight.path().to_owned(),
                problem: format!(
                    "tensor {name} is FP8, but config.json has no quantization_config that says how it is scaled"
                ),
            })?;
            let scales =
                self.tensor(&format!("{name}_scale_inv"), &[out.div_ceil(block[0]), inner.div_ceil(block[1])])?;
            if scales.dtype() != safetensors::Dtype::F32 {
                return Err(Error::Checkpoint {
                    path: scales.path().to_owned(),
                    problem: format!("tensor {} must be F32, got {:?}", scales.name(), scales.dtype()),
                });
            }
            Some((scales, block))
        } else {
            None
        };
        Ok(StoredLinear { weight, scales, bias: None })
    }

    /// `module.weight`, and `module.bias` where the model has one.
    fn linear(&self, module: &str, shape: [usize; 2], bias: bool) -> Result<StoredLinear> {
        let mut linear = self.matrix(&format!("{module}.weight"), shape)?;
        if bias {
            linear.bias = Some(self.vector(&format!("{module}.bias"), shape[0])?);
        }
        Ok(linear)
    }

    /// The attention of layer `layer`.
    pub(crate) fn attention(&self, layer: usize) -> Result<AttentionWeights> {
        let d = self.config.hidden_size;
        let module = |name: &str| format!("model.layers.{layer}.self_attn.{name}");
        match self.config.attention {
            Attention::Grouped { num_heads, num_kv_heads, head_dim, qkv_bias, output_bias, qk_norm, .. } => {
                let (width, kv_width) = (num_heads * head_dim, num_kv_heads * head_dim);
                let norms = match qk_norm {
                    QkNorm::None => None,
                    QkNorm::PerHead => Some([head_dim, head_dim]),
                    QkNorm::Whole => Some([width, kv_width]),
                };
                let norm = |name: &str, len| self.vector(&module(name), len);
                Ok(AttentionWeights::Grouped {
                    q: self.linear(&module("q_proj"), [width, d], qkv_bias)?,
                    k: self.linear(&module("k_proj"), [kv_width, d], qkv_bias)?,
                    v: self.linear(&module("v_proj"), [kv_width, d], qkv_bias)?,
                    o: self.linear(&module("o_proj"), [d, width], output_bias)?,
                    qk_norm: match norms {
                        Some([q, k]) => Some([norm("q_norm.weight", q)?, norm("k_norm.weight", k)?]),
                        None => None,
                    },
                })
            }
            Attention::Latent {
                num_heads,
                q_lora_rank,
                kv_lora_rank,
                qk_nope_head_dim,
                qk_rope_head_dim,
                v_head_dim,
                bias,
                ..
            } => {
                let width = num_heads * (qk_nope_head_dim + qk_rope_head_dim);
                let (q_a, q) = match q_lora_rank {
                    Some(rank) => (
                        Some((
                            self.linear(&module("q_a_proj"), [rank, d], bias)?,
                            self.vector(&module("q_a_layernorm.weight"), rank)?,
                        )),
                        self.linear(&module("q_b_proj"), [width, rank], false)?,
                    ),
                    None => (None, self.linear(&module("q_proj"), [width, d], false)?),
                };
                let kv_b = [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank];
                Ok(AttentionWeights::Latent {
                    q_a,
                    q,
                    kv_a: self.linear(&module("kv_a_proj_with_mqa"), [kv_lora_rank + qk_rope_head_dim, d], bias)?,
                    kv_a_norm: self.vector(&module("kv_a_layernorm.weight"), kv_lora_rank)?,
                    kv_b: self.linear(&module("kv_b_proj"), kv_b, false)?,
                    o: self.linear(&module("o_proj"), [d, num_heads * v_head_dim], bias)?,
                })
            }
        }
    }

    /// The feed-forward part of layer `layer`.
    pub(crate) fn feed_forward(&self, layer: usize) -> Result<FeedForwardWeights> {
        let config = self.config;
        let d = config.hidden_size;
        let (FeedForward::Moe, Some(moe)) = (config.layers[layer], &config.moe) else {
            let names = ["gate_proj", "up_proj", "down_proj"];
            let module = format!("model.layers.{layer}.mlp");
            return Ok(FeedForwardWeights::Dense(self.swiglu(
                &module,
                names,
                config.intermediate_size,
                config.mlp_bias,
            )?));
        };
        let module = format!("model.layers.{layer}.{}", moe.names.module);
        let num_experts = moe.routing.num_experts();
        let expert = |e| self.swiglu(&format!("{module}.experts.{e}"), moe.names.expert, moe.intermediate_size, false);
        let shared = match moe.shared {
            Some(shared) => {
                let name = format!("{module}.{}", moe.names.shared);
                let names = ["gate_proj", "up_proj", "down_proj"];
                let gate = if shared.gated { Some(self.matrix(&format!("{name}_gate.weight"), [1, d])?) } else { None };
                Some((self.swiglu(&name, names, shared.intermediate_size, false)?, gate))
            }
            None => None,
        };
        Ok(FeedForwardWeights::Moe {
            gate: self.matrix(&format!("{module}.gate.weight"), [num_experts, d])?,
            selection_bias: if moe.selection_bias {
                Some(self.vector(&format!("{module}.gate.e_score_correction_bias"), num_experts)?)
            } else {
                None
            },
            experts: (0..num_experts).map(expert).collect::<Result<_>>()?,
            shared,
        })
    }

    fn swiglu(&self, module: &str, [gate, up, down]: [&str; 3], n: usize, bias: bool) -> Result<SwiGluWeights> {
        let d = self.config.hidden_size;
        Ok(SwiGluWeights {
            gate: self.linear(&format!("{module}.{gate}"), [n, d], bias)?,
            up: self.linear(&format!("{module}.{up}"), [n, d], bias)?,
            down: self.linear(&format!("{module}.{down}"), [d, n], bias)?,
        })
    }
}
