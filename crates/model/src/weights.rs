//! A checkpoint's tensors, gathered into the parts that a backend loads whole.

use std::collections::HashMap;

use anabranch::{
    Dtype,
    reference::{Matrix, random},
};

use crate::{
    Checkpoint, Config, Error, Result, Tensor,
    config::{Attention, FeedForward, QkNorm},
    init::Values,
    tensors::TensorSpec,
};

/// A weight `[out, in]` as it comes, with its bias.
#[derive(Debug, Clone)]
pub struct StoredLinear {
    /// The weight.
    pub weight: Source,
    /// `[out]`, widened to float32.
    pub bias: Option<Vec<f32>>,
}

/// Where a matrix's values come from.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Source {
    /// A checkpoint.
    Stored {
        /// The values as they are stored.
        tensor: Tensor,
        /// Float32 scales of the weight's blocks, and the blocks' size; for FP8 only.
        scales: Option<(Tensor, [usize; 2])>,
    },
    /// Nowhere: element `i` is [`anabranch::reference::random`]`(seed, i, scale)`, row by row, which a device makes as well.
    Random {
        /// Rows and columns.
        shape: [usize; 2],
        /// What the values hang on, beside their place.
        seed: u64,
        /// Their standard deviation.
        scale: f32,
    },
}

impl StoredLinear {
    /// Rows and columns: out and in.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the stored tensor is no matrix.
    pub fn shape(&self) -> Result<[usize; 2]> {
        match &self.weight {
            Source::Random { shape, .. } => Ok(*shape),
            Source::Stored { tensor, .. } => match *tensor.shape() {
                [rows, columns] => Ok([rows, columns]),
                _ => Err(Error::Checkpoint {
                    path: tensor.path().to_owned(),
                    problem: format!("tensor {} must have 2 dimensions, got shape {:?}", tensor.name(), tensor.shape()),
                }),
            },
        }
    }

    /// The weight as an operation reads it, where it is stored.
    ///
    /// # Errors
    /// [`Error::Input`] if the values are random, and those of [`StoredLinear::shape`].
    pub fn matrix(&self) -> Result<Matrix<'_>> {
        let [rows, columns] = self.shape()?;
        let Source::Stored { tensor, scales } = &self.weight else {
            return Err(Error::Input(
                "random weights are made on a GPU only: use one, or write a checkpoint with `anabranch init`"
                    .to_owned(),
            ));
        };
        let matrix = Matrix::new(tensor.weight_dtype()?, rows, columns, tensor.bytes())?;
        Ok(match scales {
            Some((scales, block)) => matrix.with_scales(scales.bytes(), *block)?,
            None => matrix,
        })
    }

    /// The weight row by row.
    #[cfg(feature = "cuda")]
    pub(crate) fn rows(&self) -> Result<Rows<'_>> {
        Ok(match self.weight {
            Source::Random { shape: [_, columns], seed, scale } => Rows::Random { columns, seed, scale },
            Source::Stored { .. } => Rows::Stored(self.matrix()?),
        })
    }
}

/// Rows of a weight as float32, wherever they come from.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rows<'a> {
    Stored(Matrix<'a>),
    Random { columns: usize, seed: u64, scale: f32 },
}

#[cfg(feature = "cuda")]
impl Rows<'_> {
    /// Row `row` as it is stored, where that is bf16.
    pub(crate) fn bf16(&self, row: usize) -> Option<&[u8]> {
        match self {
            Self::Stored(matrix) if matrix.dtype() == Dtype::Bf16 => Some(matrix.row_bytes(row)),
            _ => None,
        }
    }

    /// Writes row `row` to `out`, which is as long as a row.
    pub(crate) fn read(&self, row: usize, out: &mut [f32]) {
        match *self {
            Self::Stored(matrix) => matrix.read_row(row, out),
            Self::Random { columns, seed, scale } => {
                let first = (row * columns) as u64;
                (first..).zip(out).for_each(|(index, value)| *value = random(seed, index, scale));
            }
        }
    }
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

/// Finds a model's weights and checks every shape.
pub(crate) struct Weights<'a> {
    pub(crate) origin: Origin<'a>,
    pub(crate) config: &'a Config,
}

/// What holds the weights.
pub(crate) enum Origin<'a> {
    Checkpoint(&'a Checkpoint),
    /// Nothing: every tensor by its name, and a seed for all of them together.
    Random {
        specs: HashMap<String, TensorSpec>,
        seed: u64,
    },
}

impl Origin<'_> {
    /// Random weights for a configuration without quantisation.
    pub(crate) fn random(config: &Config, seed: u64) -> Self {
        let specs = config.tensors().into_iter().map(|spec| (spec.name.clone(), spec)).collect();
        Self::Random { specs, seed }
    }
}

/// How a tensor of a random model is distributed, and its seed.
fn values(specs: &HashMap<String, TensorSpec>, seed: u64, name: &str) -> Result<(Values, u64)> {
    let spec = specs.get(name).ok_or_else(|| Error::Input(format!("the configuration lists no tensor {name}")))?;
    Ok((Values::of(spec), Values::seed(seed, name)))
}

/// A tensor of this shape.
fn tensor(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<Tensor> {
    let tensor = checkpoint.get(name)?;
    tensor.expect_shape(shape)?;
    Ok(tensor)
}

impl Weights<'_> {
    /// A norm's weight, a bias.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        match &self.origin {
            Origin::Checkpoint(checkpoint) => tensor(checkpoint, name, &[len])?.to_f32(),
            Origin::Random { specs, seed } => {
                let (values, seed) = values(specs, *seed, name)?;
                Ok((0..len as u64).map(|index| values.mean + random(seed, index, values.spread)).collect())
            }
        }
    }

    /// A matrix of weights, with its scales if it is FP8.
    pub(crate) fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<StoredLinear> {
        let weight = match &self.origin {
            Origin::Checkpoint(checkpoint) => self.stored(checkpoint, name, shape)?,
            Origin::Random { specs, seed } => {
                let (values, seed) = values(specs, *seed, name)?;
                Source::Random { shape, seed, scale: values.spread }
            }
        };
        Ok(StoredLinear { weight, bias: None })
    }

    fn stored(&self, checkpoint: &Checkpoint, name: &str, [out, inner]: [usize; 2]) -> Result<Source> {
        let weight = tensor(checkpoint, name, &[out, inner])?;
        if weight.weight_dtype()? != Dtype::F8E4m3 {
            return Ok(Source::Stored { tensor: weight, scales: None });
        }
        let block = self.config.fp8_block.ok_or_else(|| Error::Checkpoint {
            path: weight.path().to_owned(),
            problem: format!(
                "tensor {name} is FP8, but config.json has no quantization_config that says how it is scaled"
            ),
        })?;
        let blocks = [out.div_ceil(block[0]), inner.div_ceil(block[1])];
        let scales = tensor(checkpoint, &format!("{name}_scale_inv"), &blocks)?;
        if scales.dtype() != safetensors::Dtype::F32 {
            return Err(Error::Checkpoint {
                path: scales.path().to_owned(),
                problem: format!("tensor {} must be F32, got {:?}", scales.name(), scales.dtype()),
            });
        }
        Ok(Source::Stored { tensor: weight, scales: Some((scales, block)) })
    }

    /// `module.weight`, and `module.bias` where the model has one.
    fn linear(&self, module: &str, shape: [usize; 2], bias: bool) -> Result<StoredLinear> {
        let mut linear = self.matrix(&format!("{module}.weight"), shape)?;
        if bias {
            linear.bias = Some(self.vector(&format!("{module}.bias"), shape[0])?);
        }
        Ok(linear)
    }

    /// Whether the checkpoint holds an LM head that is not its embedding table. Where `tie_word_embeddings` is true all
    /// the same, as after fine-tuning, Transformers 5 takes the head that is stored.
    pub(crate) fn untied_head(&self) -> Result<bool> {
        let name = "lm_head.weight";
        match &self.origin {
            Origin::Checkpoint(checkpoint) if checkpoint.contains(name) => {
                Ok(checkpoint.get(name)?.bytes() != checkpoint.get("model.embed_tokens.weight")?.bytes())
            }
            _ => Ok(false),
        }
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
