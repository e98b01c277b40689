//! A model's architecture, as every family describes it.

pub(crate) mod json;
mod read;

use anabranch::{Dtype, Rope, Routing};

/// An architecture: what `config.json` says, in one form for every family, validated.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The family, as `config.json` names it.
    pub model_type: String,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream, d.
    pub hidden_size: usize,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every RMS norm of width d.
    pub rms_norm_eps: f32,
    /// Whether the LM head is the embedding table.
    pub tie_word_embeddings: bool,
    /// How weights are stored, where nothing else is said.
    pub dtype: Dtype,
    /// Set if the linear layers of the blocks are stored as block-scaled FP8: rows and columns that share one scale.
    pub fp8_block: Option<[usize; 2]>,
    /// The attention of every layer.
    pub attention: Attention,
    /// Softmax scale of the attention, with `YaRN`'s correction where the family has one.
    pub softmax_scale: f32,
    /// The rotary embedding.
    pub rope: Rope,
    /// The feed-forward part of each layer; one entry per layer.
    pub layers: Vec<FeedForward>,
    /// Width of the dense feed-forward layers.
    pub intermediate_size: usize,
    /// What feed-forward widths were rounded up to a multiple of, if the family's authors defined them as a fraction
    /// of the standard 8d/3 and count compute by the fraction (see [`PaperFlops`](crate::analysis::PaperFlops)).
    pub ffn_multiple: Option<usize>,
    /// Whether the dense feed-forward layers have biases.
    pub mlp_bias: bool,
    /// The MoE layers' shape; `None` in a dense model.
    pub moe: Option<Moe>,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// The kind of attention.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Attention {
    /// Multi-head and grouped-query attention.
    Grouped {
        /// Query heads.
        num_heads: usize,
        /// Key and value heads; divides the query heads.
        num_kv_heads: usize,
        /// Elements of a head.
        head_dim: usize,
        /// Whether q, k and v have biases.
        qkv_bias: bool,
        /// Whether the output projection has a bias.
        output_bias: bool,
        /// RMS norm of queries and keys before the rotation.
        qk_norm: QkNorm,
        /// Limits q, k and v to plus or minus this value (OLMoE).
        clip_qkv: Option<f32>,
    },
    /// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eq. 37-47).
    Latent {
        /// Query heads.
        num_heads: usize,
        /// Rank of the query's down projection; `None` if the query is projected directly.
        q_lora_rank: Option<usize>,
        /// Width of the cached latent.
        kv_lora_rank: usize,
        /// Elements of a query or key head that carry no position.
        qk_nope_head_dim: usize,
        /// Elements that do; the key's are shared by all heads.
        qk_rope_head_dim: usize,
        /// Elements of a value head.
        v_head_dim: usize,
        /// Whether the down projections and the output projection have biases.
        bias: bool,
        /// Epsilon of the two inner norms (1e-6 in every published model, whatever `rms_norm_eps` says).
        inner_norm_eps: f32,
    },
}

/// Normalisation of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Over each head (Qwen3, GLM-4.5).
    PerHead,
    /// Over the whole projection (OLMoE).
    Whole,
}

/// The kind of a layer's feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeedForward {
    /// One `SwiGLU` of `intermediate_size`.
    Dense,
    /// Routed and perhaps shared experts.
    Moe,
}

/// The shape of the MoE layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// The router's rule.
    pub routing: Routing,
    /// Whether the router has a selection bias (`e_score_correction_bias`, always float32).
    pub selection_bias: bool,
    /// Width of a routed expert, n.
    pub intermediate_size: usize,
    /// Experts that every token passes through, stored as one wide `SwiGLU`.
    pub shared: Option<SharedExperts>,
    /// What the weights are called.
    pub names: MoeNames,
}

/// The shared experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedExperts {
    /// Their width in all.
    pub intermediate_size: usize,
    /// Whether a sigmoid gate scales their output (Qwen2-MoE's `shared_expert_gate`).
    pub gated: bool,
}

/// What a family calls the weights of its MoE layers, under `model.layers.N.`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeNames {
    /// The module: `mlp`, or Mixtral's `block_sparse_moe`.
    pub module: &'static str,
    /// Gate, up and down projection of an expert.
    pub expert: [&'static str; 3],
    /// The shared experts' module under `module`.
    pub shared: &'static str,
}

impl MoeNames {
    /// `mlp.experts.E.gate_proj`, `mlp.shared_experts`: DeepSeek, GLM, and Qwen but for its singular `shared_expert`.
    pub const STANDARD: Self =
        Self { module: "mlp", expert: ["gate_proj", "up_proj", "down_proj"], shared: "shared_experts" };
}

impl Attention {
    /// Query heads.
    pub fn num_heads(&self) -> usize {
        match *self {
            Self::Grouped { num_heads, .. } | Self::Latent { num_heads, .. } => num_heads,
        }
    }
}
