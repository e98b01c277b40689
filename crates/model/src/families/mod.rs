//! From a family's `config.json` to a [`Config`](crate::Config): one file for each family and one line in [`FAMILIES`].

mod attention;
mod deepseek;
mod deepseek_v2;
mod deepseek_v3;
mod glm4_moe;
mod llama;
mod mixtral;
mod moe;
mod olmoe;
mod qwen2_moe;
mod qwen3_moe;
mod rope;
mod storage;

use anabranch::Rope;

use crate::{
    Result,
    config::{Attention, FeedForward, Moe, json::Object},
};

pub(crate) use storage::{Storage, storage};

/// `model_type` and what reads it.
pub(crate) const FAMILIES: &[(&str, Family)] = &[
    ("deepseek", deepseek::read),
    ("deepseek_v2", deepseek_v2::read),
    ("deepseek_v3", deepseek_v3::read),
    ("glm4_moe", glm4_moe::read),
    ("kimi_k2", deepseek_v3::read),
    ("llama", llama::read),
    ("mixtral", mixtral::read),
    ("olmoe", olmoe::read),
    ("qwen2_moe", qwen2_moe::read),
    ("qwen3_moe", qwen3_moe::read),
];

/// Reads what is particular to a family.
pub(crate) type Family = fn(&Object<'_>, &Base) -> Result<Architecture>;

/// Bounds of what is read. They lie far above every published model, and low enough that no size computed from
/// them overflows.
pub(crate) const MAX_WIDTH: usize = 1 << 20;
pub(crate) const MAX_HEADS: usize = 1 << 14;
pub(crate) const MAX_HEAD_DIM: usize = 1 << 14;
/// Widest projection of all heads together.
pub(crate) const MAX_PROJECTION: usize = 1 << 22;

/// What every family has and calls by the same name.
pub(crate) struct Base {
    pub(crate) hidden_size: usize,
    pub(crate) num_layers: usize,
    pub(crate) max_position_embeddings: usize,
}

/// What a family says about its blocks.
pub(crate) struct Architecture {
    pub(crate) attention: Attention,
    pub(crate) rope: Rope,
    pub(crate) softmax_scale: f32,
    pub(crate) layers: Vec<FeedForward>,
    pub(crate) intermediate_size: usize,
    pub(crate) mlp_bias: bool,
    /// `None` for a family without experts; dropped later if no layer is MoE.
    pub(crate) moe: Option<Moe>,
    /// See [`Config::ffn_multiple`](crate::Config::ffn_multiple).
    pub(crate) ffn_multiple: Option<usize>,
}
