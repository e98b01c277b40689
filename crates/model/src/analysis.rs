//! What a configuration tells about a model without its weights: sizes, compute, memory.

use std::fmt::Display;

use anabranch::{Dtype, GroupScore, Renormalize, Score};
use serde::{Serialize, Serializer};

use crate::{
    config::{Attention, Config, FeedForward, QkNorm},
    tensors::{Part, TensorKind},
};

mod paper;

pub use paper::{Comparison, PaperFlops};

/// Everything that `inspect` shows.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Analysis {
    /// The family.
    pub model_type: String,
    /// Blocks.
    pub num_layers: usize,
    /// Blocks with experts.
    pub num_moe_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of dense feed-forward layers; `None` if there are none.
    pub intermediate_size: Option<usize>,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Longest sequence.
    pub max_position_embeddings: usize,
    /// The attention, in words.
    pub attention: String,
    /// The routing; `None` in a dense model.
    pub routing: Option<RoutingSummary>,
    /// Tensors in the checkpoint.
    pub tensors: usize,
    /// All parameters, selection biases included; FP8 scales and multi-token-prediction layers not.
    pub total_parameters: u64,
    /// Parameters that one token uses: all but those of experts that it does not visit. Both the embedding table and
    /// the LM head count in full.
    pub active_parameters: u64,
    /// The same without the embedding table, of which a token reads one row. A table that is also the LM head counts.
    pub active_parameters_without_embedding: u64,
    /// `active_parameters / total_parameters`.
    pub active_share: f64,
    /// Bytes of all tensors on disk, FP8 scales included.
    pub weight_bytes: u64,
    /// The same by part; parts that the model lacks are left out.
    pub parts: Vec<PartSize>,
    /// Compute of one token.
    pub forward: ForwardFlops,
    /// The cache of keys and values.
    pub cache: CacheSize,
    /// Bytes needed to run one sequence as long as `forward.context`: weights as stored, and the cache.
    pub memory_bytes: u64,
}

/// The size of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PartSize {
    /// The part.
    pub part: Part,
    /// Its parameters.
    pub parameters: u64,
    /// Of them, those that one token uses.
    pub active_parameters: u64,
    /// Its bytes on disk, FP8 scales included.
    pub bytes: u64,
}

/// The routing, as a table shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct RoutingSummary {
    /// Routed experts, E.
    pub num_experts: usize,
    /// Experts that a token visits, K.
    pub topk: usize,
    /// Width of an expert, n.
    pub intermediate_size: usize,
    /// Width of the shared experts in all; 0 without any.
    pub shared_intermediate_size: usize,
    /// `softmax`, `sigmoid` or `topk_softmax`.
    pub score: &'static str,
    /// Whether a bias steers the selection.
    pub selection_bias: bool,
    /// Whether the chosen scores are divided by their sum.
    pub renormalized: bool,
    /// Factor on the weights.
    pub scale: f32,
    /// Groups of experts; 1 if the choice is not limited.
    pub n_group: usize,
    /// Groups that a token may choose from.
    pub topk_group: usize,
    /// How a group is scored: `max` or `top2_sum`; `None` if the choice is not limited.
    pub group_score: Option<&'static str>,
}

/// Floating-point operations (a multiply and an add are two) of one token's forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ForwardFlops {
    /// Tokens that the token attends to, itself included.
    pub context: usize,
    /// Products with weights: twice the active parameters of the matrices, LM head included, embedding not.
    pub weights: f64,
    /// Scores and their products with values, with keys and values of full heads (latent attention that stays in the
    /// latent space trades these for others).
    pub attention: f64,
    /// Both.
    pub total: f64,
}

/// The cache of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct CacheSize {
    /// Numbers per token, all layers: keys and values of grouped attention, or the latent and the rotated key part.
    pub values_per_token: u64,
    /// Their data type.
    #[serde(serialize_with = "display")]
    pub dtype: Dtype,
    /// Bytes per token.
    pub bytes_per_token: u64,
    /// Bytes for the context.
    pub bytes: u64,
}

fn display<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

impl Analysis {
    /// Analyses a configuration for a sequence of `context` tokens, whose cache holds `cache_dtype`.
    ///
    /// ```
    /// use anabranch::Dtype;
    /// use anabranch_model::{Config, analysis::Analysis};
    /// let config = Config::preset("deepseek-moe-16b").unwrap()?;
    /// let analysis = Analysis::new(&config, 4096, Dtype::Bf16);
    /// assert_eq!(analysis.total_parameters, 16_375_728_128);
    /// # Ok::<(), anabranch_model::Error>(())
    /// ```
    pub fn new(config: &Config, context: usize, cache_dtype: Dtype) -> Self {
        let sizes = Sizes::new(config);
        let sum = |of: fn(&PartSize) -> u64| sizes.parts.iter().map(of).sum::<u64>();
        let total_parameters = sum(|part| part.parameters);
        let active_parameters = sum(|part| part.active_parameters);
        let weight_bytes = sum(|part| part.bytes);
        let table = (config.vocab_size * config.hidden_size) as u64;
        let unread_table = if config.tie_word_embeddings { 0 } else { table };

        let weights = 2.0 * sizes.active_matrix_parameters as f64;
        let heads = head_dims(&config.attention);
        let attention = 2.0 * context as f64 * heads as f64 * config.layers.len() as f64;

        let values_per_token = cache_width(&config.attention) as u64 * config.layers.len() as u64;
        let bytes_per_token = values_per_token * cache_dtype.size() as u64;
        // The context is the caller's: it may be absurd.
        let cache_bytes = bytes_per_token.saturating_mul(context as u64);

        let is_moe = |kind: &&FeedForward| **kind == FeedForward::Moe;
        let num_moe_layers = config.layers.iter().filter(is_moe).count();
        Self {
            model_type: config.model_type.clone(),
            num_layers: config.layers.len(),
            num_moe_layers,
            hidden_size: config.hidden_size,
            intermediate_size: (num_moe_layers < config.layers.len()).then_some(config.intermediate_size),
            vocab_size: config.vocab_size,
            max_position_embeddings: config.max_position_embeddings,
            attention: describe_attention(&config.attention),
            routing: RoutingSummary::new(config),
            tensors: config.tensor_count(),
            total_parameters,
            active_parameters,
            active_parameters_without_embedding: active_parameters - unread_table,
            active_share: active_parameters as f64 / total_parameters as f64,
            weight_bytes,
            parts: sizes.parts,
            forward: ForwardFlops { context, weights, attention, total: weights + attention },
            cache: CacheSize { values_per_token, dtype: cache_dtype, bytes_per_token, bytes: cache_bytes },
            memory_bytes: weight_bytes.saturating_add(cache_bytes),
        }
    }
}

/// Sums over the tensors.
struct Sizes {
    parts: Vec<PartSize>,
    /// Of matrices that a token is multiplied with: not the embedding table, unless it is the LM head.
    active_matrix_parameters: u64,
}

impl Sizes {
    fn new(config: &Config) -> Self {
        let mut parts = Part::ALL.map(|part| PartSize { part, parameters: 0, active_parameters: 0, bytes: 0 });
        let mut active_matrix_parameters = 0;
        for group in config.tensor_groups() {
            // A Config's parameters are bounded when it is read.
            let elements = group.elements() as u64;
            let entry = &mut parts[group.part as usize];
            entry.bytes += elements * group.dtype.size() as u64;
            if group.kind == TensorKind::Scale {
                continue;
            }
            let active = match (&config.moe, group.part) {
                (Some(moe), Part::RoutedExperts) => {
                    elements / moe.routing.num_experts() as u64 * moe.routing.topk() as u64
                }
                _ => elements,
            };
            entry.parameters += elements;
            entry.active_parameters += active;
            let multiplied = group.part != Part::Embedding || config.tie_word_embeddings;
            if group.kind == TensorKind::Matrix && multiplied {
                active_matrix_parameters += active;
            }
        }
        Self { parts: parts.into_iter().filter(|part| part.bytes > 0).collect(), active_matrix_parameters }
    }
}

impl RoutingSummary {
    fn new(config: &Config) -> Option<Self> {
        let moe = config.moe.as_ref()?;
        let routing = &moe.routing;
        let groups = routing.group_limit();
        Some(Self {
            num_experts: routing.num_experts(),
            topk: routing.topk(),
            intermediate_size: moe.intermediate_size,
            shared_intermediate_size: moe.shared.map_or(0, |shared| shared.intermediate_size),
            score: match routing.score() {
                Score::Sigmoid => "sigmoid",
                Score::TopkSoftmax => "topk_softmax",
                _ => "softmax",
            },
            selection_bias: moe.selection_bias,
            renormalized: routing.renormalize() == Renormalize::Sum,
            scale: routing.scale(),
            n_group: groups.map_or(1, |groups| groups.n_group),
            topk_group: groups.map_or(1, |groups| groups.topk_group),
            group_score: groups.map(|groups| if groups.score == GroupScore::Max { "max" } else { "top2_sum" }),
        })
    }
}

/// Numbers that a layer caches for a token.
fn cache_width(attention: &Attention) -> usize {
    match *attention {
        Attention::Grouped { num_kv_heads, head_dim, .. } => 2 * num_kv_heads * head_dim,
        Attention::Latent { kv_lora_rank, qk_rope_head_dim, .. } => kv_lora_rank + qk_rope_head_dim,
    }
}

/// Multiply-adds of a layer's attention for each pair of tokens: elements of all query and value heads.
fn head_dims(attention: &Attention) -> usize {
    match *attention {
        Attention::Grouped { num_heads, head_dim, .. } => 2 * num_heads * head_dim,
        Attention::Latent { num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
            num_heads * (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)
        }
    }
}

fn describe_attention(attention: &Attention) -> String {
    match *attention {
        Attention::Grouped { num_heads, num_kv_heads, head_dim, qk_norm, .. } => {
            let heads = if num_heads == num_kv_heads {
                format!("multi-head, {num_heads} heads of {head_dim}")
            } else {
                format!("grouped-query, {num_heads} heads of {head_dim}, {num_kv_heads} for keys and values")
            };
            let norm = match qk_norm {
                QkNorm::None => "",
                QkNorm::PerHead => ", norm of each query and key head",
                QkNorm::Whole => ", norm of the query and key projections",
            };
            format!("{heads}{norm}")
        }
        Attention::Latent {
            num_heads,
            q_lora_rank,
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
            ..
        } => {
            let query = q_lora_rank.map_or(String::new(), |rank| format!(", query rank {rank}"));
            format!(
                "latent, {num_heads} heads of {qk_nope_head_dim} + {qk_rope_head_dim} rotary, values of {v_head_dim}, \
                 latent of {kv_lora_rank}{query}"
            )
        }
    }
}
