//! Training compute as the DeepSeekMoE paper counts it (arXiv 2401.06066, tables 1 to 4).

use serde::Serialize;

use super::head_dims;
use crate::{
    config::{Config, FeedForward},
    tensors::{Part, TensorKind},
};

/// FLOPs of a training step (forward and backward) on one sequence, by the formula behind the paper's tables:
///
/// ```text
/// s * (6 * (attention + feed-forward parameters that a token uses) + 12 * L * d * s + 6 * V * d)
/// ```
///
/// with attention that is not causal, the LM head counted once, and router, norms and biases not counted. With heads
/// that are not d wide in all, attention parameters and the quadratic term follow the heads.
///
/// The paper counts the widths that it defines, fractions and multiples of the standard feed-forward width 8d/3, where
/// stored widths are these rounded up to a multiple ([`Config::ffn_multiple`]): 1365.3 for the 16B model's 1408,
/// 10922.7 for LLaMA-2-7B's 11008. So does this, if all feed-forward widths of the model are such roundings of 8d/3
/// times a power of two; otherwise all count as stored, which reproduces the paper's 145B model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PaperFlops {
    /// Tokens in the sequence.
    pub sequence: usize,
    /// FLOPs for the sequence.
    pub flops: f64,
    /// Whether widths count as defined instead of as stored.
    pub nominal_widths: bool,
}

impl PaperFlops {
    /// Counts for a sequence of `sequence` tokens.
    pub fn new(config: &Config, sequence: usize) -> Self {
        let layers = config.layers.len() as f64;
        let hidden = config.hidden_size as f64;
        let attention: f64 = config
            .tensor_groups()
            .iter()
            .filter(|group| group.part == Part::Attention && group.kind == TensorKind::Matrix)
            .map(|group| group.elements() as f64)
            .sum();

        let nominal = Widths::nominal(config);
        let widths = nominal.unwrap_or_else(|| Widths::stored(config));
        let is_moe = |kind: &&FeedForward| **kind == FeedForward::Moe;
        let moe_layers = config.layers.iter().filter(is_moe).count() as f64;
        let feed_forward = 3.0 * hidden * ((layers - moe_layers) * widths.dense + moe_layers * widths.moe);

        let tokens = sequence as f64;
        let pairs = 6.0 * layers * head_dims(&config.attention) as f64 * tokens;
        let head = 6.0 * config.vocab_size as f64 * hidden;
        let flops = tokens * (6.0 * (attention + feed_forward) + pairs + head);
        Self { sequence, flops, nominal_widths: nominal.is_some() }
    }
}

/// Feed-forward widths that a token passes through.
#[derive(Clone, Copy)]
struct Widths {
    dense: f64,
    moe: f64,
}

impl Widths {
    fn stored(config: &Config) -> Self {
        let dense = config.intermediate_size as f64;
        Self { dense, moe: Self::moe(config, |width| Some(width as f64)).unwrap_or(0.0) }
    }

    fn nominal(config: &Config) -> Option<Self> {
        let multiple = config.ffn_multiple?;
        let standard = 8.0 * config.hidden_size as f64 / 3.0;
        let of = |width: usize| {
            (-6..=2)
                .rev()
                .map(|power| standard * f64::powi(2.0, power))
                .find(|exact| (exact / multiple as f64).ceil() * multiple as f64 == width as f64)
        };
        let dense = if config.layers.contains(&FeedForward::Dense) { of(config.intermediate_size)? } else { 0.0 };
        let moe = if config.moe.is_some() { Self::moe(config, of)? } else { 0.0 };
        Some(Self { dense, moe })
    }

    /// Of the visited and the shared experts; the shared ones are a multiple of a routed one here, or count as stored.
    fn moe(config: &Config, of: impl Fn(usize) -> Option<f64>) -> Option<f64> {
        let moe = config.moe.as_ref()?;
        let expert = of(moe.intermediate_size)?;
        let shared = moe.shared.map_or(0.0, |shared| shared.intermediate_size as f64 / moe.intermediate_size as f64);
        Some(expert * (moe.routing.topk() as f64 + shared))
    }
}

/// The compute of one model against another's, by [`PaperFlops`].
///
/// ```
/// use anabranch_model::{Config, analysis::Comparison};
/// let moe = Config::preset("deepseek-moe-16b").unwrap()?;
/// let dense = Config::preset("llama-2-7b").unwrap()?;
/// let comparison = Comparison::new(&moe, &dense, 4096);
/// assert_eq!(format!("{:.1}T", comparison.model.flops / 1e12), "74.4T");
/// assert_eq!(format!("{:.1}T", comparison.versus.flops / 1e12), "187.9T");
/// assert_eq!(format!("{:.1}%", 100.0 * comparison.ratio), "39.6%");
/// # Ok::<(), anabranch_model::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Comparison {
    /// The model.
    pub model: PaperFlops,
    /// What it is compared with.
    pub versus: PaperFlops,
    /// The model's FLOPs divided by the other's.
    pub ratio: f64,
}

impl Comparison {
    /// Compares on one sequence of `sequence` tokens.
    pub fn new(model: &Config, versus: &Config, sequence: usize) -> Self {
        let (model, versus) = (PaperFlops::new(model, sequence), PaperFlops::new(versus, sequence));
        Self { model, versus, ratio: model.flops / versus.flops }
    }
}
