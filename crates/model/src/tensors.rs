//! Every tensor of a model: name on disk, shape, data type. The one source of truth for loading, checking, counting
//! and making checkpoints.
//!
//! Names are those of the published checkpoints, with one matrix for each expert. Multi-token-prediction layers are
//! not part of the main model and not listed.

use anabranch::Dtype;
use serde::Serialize;

use crate::config::{Attention, Config, FeedForward, Moe, QkNorm};

/// One tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name on disk.
    pub name: String,
    /// Its shape; matrices are `[out, in]`.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub dtype: Dtype,
    /// The part of the model that it belongs to.
    pub part: Part,
    /// What it is.
    pub kind: TensorKind,
}

/// A part of a model, as `inspect` adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Part {
    /// The embedding table, which is also the LM head where the two are tied.
    Embedding,
    /// Projections of the attention, with its inner norms.
    Attention,
    /// Norms of the residual stream.
    Norm,
    /// Gates that choose experts, with their selection biases.
    Router,
    /// Experts of which each token visits a few.
    RoutedExperts,
    /// Experts that every token visits, with their gate.
    SharedExperts,
    /// Feed-forward layers without experts.
    Dense,
    /// The LM head, where it is not the embedding table.
    LmHead,
}

impl Part {
    /// All parts, in the order of a model.
    pub const ALL: [Self; 8] = [
        Self::Embedding,
        Self::Attention,
        Self::Norm,
        Self::Router,
        Self::RoutedExperts,
        Self::SharedExperts,
        Self::Dense,
        Self::LmHead,
    ];
}

/// What a tensor is, which decides how `init` fills it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum TensorKind {
    /// A matrix `[out, in]` that is multiplied with.
    Matrix,
    /// The bias of a projection.
    Bias,
    /// The weight of an RMS norm.
    Norm,
    /// The router's selection bias, always float32.
    SelectionBias,
    /// The scales of a block-scaled FP8 matrix, float32; not parameters, since they carry no information of their own.
    Scale,
}

/// A tensor, or one for each expert that differ in the expert's number only: so that 90,000 tensors are counted by
/// looking at a thousand.
pub(crate) struct Group {
    before: String,
    /// The number of experts, and what follows an expert's number in the name.
    experts: Option<(usize, &'static str)>,
    /// `[out, in]`, or `[length, 1]`.
    shape: [usize; 2],
    pub(crate) dtype: Dtype,
    pub(crate) part: Part,
    pub(crate) kind: TensorKind,
}

impl Group {
    /// Tensors in the group.
    pub(crate) fn copies(&self) -> usize {
        self.experts.map_or(1, |(experts, _)| experts)
    }

    /// Elements of all tensors of the group, wide enough for sizes that have not been checked yet.
    pub(crate) fn elements(&self) -> u128 {
        self.shape[0] as u128 * self.shape[1] as u128 * self.copies() as u128
    }

    fn specs(&self) -> impl Iterator<Item = TensorSpec> {
        let suffix = match self.kind {
            TensorKind::Matrix | TensorKind::Norm => ".weight",
            TensorKind::Bias => ".bias",
            TensorKind::SelectionBias => "",
            TensorKind::Scale => ".weight_scale_inv",
        };
        let shape = match self.kind {
            TensorKind::Matrix | TensorKind::Scale => self.shape.to_vec(),
            _ => vec![self.shape[0]],
        };
        (0..self.copies()).map(move |expert| TensorSpec {
            name: match self.experts {
                Some((_, after)) => format!("{}{expert}.{after}{suffix}", self.before),
                None => format!("{}{suffix}", self.before),
            },
            shape: shape.clone(),
            dtype: self.dtype,
            part: self.part,
            kind: self.kind,
        })
    }
}

impl Config {
    /// Every tensor of the main model, layer by layer. DeepSeek-V3 has 90,000: about 15 MB.
    ///
    /// ```
    /// let config = anabranch_model::Config::preset("olmoe-1b-7b").unwrap()?;
    /// let tensors = config.tensors();
    /// assert_eq!(tensors[0].name, "model.embed_tokens.weight");
    /// assert_eq!(tensors[0].shape, [50304, 2048]);
    /// # Ok::<(), anabranch_model::Error>(())
    /// ```
    pub fn tensors(&self) -> Vec<TensorSpec> {
        self.tensor_groups().iter().flat_map(Group::specs).collect()
    }

    /// How many tensors [`Config::tensors`] lists, without naming them.
    pub fn tensor_count(&self) -> usize {
        self.tensor_groups().iter().map(Group::copies).sum()
    }

    /// Parameters of a configuration whose sizes have not been checked together yet.
    pub(crate) fn parameters_unbounded(&self) -> u128 {
        self.tensor_groups().iter().filter(|group| group.kind != TensorKind::Scale).map(Group::elements).sum()
    }

    pub(crate) fn tensor_groups(&self) -> Vec<Group> {
        let mut list = List { config: self, groups: Vec::new() };
        let (vocab, hidden) = (self.vocab_size, self.hidden_size);
        list.plain(Part::Embedding, TensorKind::Matrix, "model.embed_tokens", [vocab, hidden]);
        for (layer, feed_forward) in self.layers.iter().enumerate() {
            let layer = format!("model.layers.{layer}");
            list.norm(Part::Norm, format!("{layer}.input_layernorm"), hidden);
            list.attention(&format!("{layer}.self_attn"));
            list.norm(Part::Norm, format!("{layer}.post_attention_layernorm"), hidden);
            match (feed_forward, &self.moe) {
                (FeedForward::Moe, Some(moe)) => list.moe(&layer, moe),
                _ => list.dense(&format!("{layer}.mlp")),
            }
        }
        list.norm(Part::Norm, "model.norm".to_owned(), hidden);
        if !self.tie_word_embeddings {
            list.plain(Part::LmHead, TensorKind::Matrix, "lm_head", [vocab, hidden]);
        }
        list.groups
    }
}

/// Builds the list of groups.
struct List<'a> {
    config: &'a Config,
    groups: Vec<Group>,
}

impl List<'_> {
    /// A tensor in the checkpoint's plain data type.
    fn plain(&mut self, part: Part, kind: TensorKind, name: impl Into<String>, shape: [usize; 2]) {
        let dtype = if kind == TensorKind::SelectionBias { Dtype::F32 } else { self.config.dtype };
        self.groups.push(Group { before: name.into(), experts: None, shape, dtype, part, kind });
    }

    fn norm(&mut self, part: Part, name: String, width: usize) {
        self.plain(part, TensorKind::Norm, name, [width, 1]);
    }

    /// A projection inside a block, which block-scaled FP8 quantises, with its scales.
    fn linear(&mut self, part: Part, name: String, shape: [usize; 2], bias: bool) {
        if bias {
            self.plain(part, TensorKind::Bias, name.clone(), [shape[0], 1]);
        }
        self.quantized(part, name, None, shape);
    }

    fn quantized(&mut self, part: Part, before: String, experts: Option<(usize, &'static str)>, shape: [usize; 2]) {
        let mut dtype = self.config.dtype;
        if let Some([rows, columns]) = self.config.fp8_block {
            dtype = Dtype::F8E4m3;
            let scales = [shape[0].div_ceil(rows), shape[1].div_ceil(columns)];
            let (before, kind) = (before.clone(), TensorKind::Scale);
            self.groups.push(Group { before, experts, shape: scales, dtype: Dtype::F32, part, kind });
        }
        self.groups.push(Group { before, experts, shape, dtype, part, kind: TensorKind::Matrix });
    }

    fn attention(&mut self, name: &str) {
        let hidden = self.config.hidden_size;
        let part = Part::Attention;
        match self.config.attention {
            Attention::Grouped { num_heads, num_kv_heads, head_dim, qkv_bias, output_bias, qk_norm, .. } => {
                let (query, key) = (num_heads * head_dim, num_kv_heads * head_dim);
                self.linear(part, format!("{name}.q_proj"), [query, hidden], qkv_bias);
                self.linear(part, format!("{name}.k_proj"), [key, hidden], qkv_bias);
                self.linear(part, format!("{name}.v_proj"), [key, hidden], qkv_bias);
                self.linear(part, format!("{name}.o_proj"), [hidden, query], output_bias);
                let widths = match qk_norm {
                    QkNorm::None => return,
                    QkNorm::PerHead => [head_dim, head_dim],
                    QkNorm::Whole => [query, key],
                };
                self.norm(part, format!("{name}.q_norm"), widths[0]);
                self.norm(part, format!("{name}.k_norm"), widths[1]);
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
                let query = num_heads * (qk_nope_head_dim + qk_rope_head_dim);
                match q_lora_rank {
                    None => self.linear(part, format!("{name}.q_proj"), [query, hidden], false),
                    Some(rank) => {
                        self.linear(part, format!("{name}.q_a_proj"), [rank, hidden], bias);
                        self.norm(part, format!("{name}.q_a_layernorm"), rank);
                        self.linear(part, format!("{name}.q_b_proj"), [query, rank], false);
                    }
                }
                let latent = kv_lora_rank + qk_rope_head_dim;
                self.linear(part, format!("{name}.kv_a_proj_with_mqa"), [latent, hidden], bias);
                self.norm(part, format!("{name}.kv_a_layernorm"), kv_lora_rank);
                let expanded = num_heads * (qk_nope_head_dim + v_head_dim);
                self.linear(part, format!("{name}.kv_b_proj"), [expanded, kv_lora_rank], false);
                self.linear(part, format!("{name}.o_proj"), [hidden, num_heads * v_head_dim], bias);
            }
        }
    }

    fn dense(&mut self, name: &str) {
        let bias = self.config.mlp_bias;
        for (projection, shape) in self.swiglu(["gate_proj", "up_proj", "down_proj"], self.config.intermediate_size) {
            self.linear(Part::Dense, format!("{name}.{projection}"), shape, bias);
        }
    }

    fn moe(&mut self, layer: &str, moe: &Moe) {
        let experts = moe.routing.num_experts();
        let hidden = self.config.hidden_size;
        let module = format!("{layer}.{}", moe.names.module);
        self.plain(Part::Router, TensorKind::Matrix, format!("{module}.gate"), [experts, hidden]);
        if moe.selection_bias {
            let name = format!("{module}.gate.e_score_correction_bias");
            self.plain(Part::Router, TensorKind::SelectionBias, name, [experts, 1]);
        }
        for (projection, shape) in self.swiglu(moe.names.expert, moe.intermediate_size) {
            self.quantized(Part::RoutedExperts, format!("{module}.experts."), Some((experts, projection)), shape);
        }
        if let Some(shared) = moe.shared {
            let name = format!("{module}.{}", moe.names.shared);
            for (projection, shape) in self.swiglu(["gate_proj", "up_proj", "down_proj"], shared.intermediate_size) {
                self.linear(Part::SharedExperts, format!("{name}.{projection}"), shape, false);
            }
            if shared.gated {
                self.plain(Part::SharedExperts, TensorKind::Matrix, format!("{name}_gate"), [1, hidden]);
            }
        }
    }

    /// Gate, up and down projection of a `SwiGLU`.
    fn swiglu(&self, names: [&'static str; 3], width: usize) -> [(&'static str, [usize; 2]); 3] {
        let hidden = self.config.hidden_size;
        let [gate, up, down] = names;
        [(gate, [width, hidden]), (up, [width, hidden]), (down, [hidden, width])]
    }
}
