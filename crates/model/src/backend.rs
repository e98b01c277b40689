//! What a device does for a model: whole steps, coarse enough that a backend may fuse inside each.

use anabranch::{Rope, reference::RopeTable};

use crate::{
    Config, Result,
    weights::{AttentionWeights, FeedForwardWeights, StoredLinear},
};

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The cache's slot.
    pub sequence: usize,
    /// Position of the first token. Whatever the cache holds from here on is overwritten.
    pub position: usize,
    /// Number of tokens.
    pub len: usize,
}

/// Tokens that go through the model together: the segments' tokens one after another, without padding.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Token ids of all segments.
    pub ids: &'a [u32],
    /// Whose they are.
    pub segments: &'a [Segment],
}

/// A batch whose lengths agree, with the angles of its positions.
#[derive(Debug)]
pub struct Positions<'a> {
    /// The segments.
    pub segments: &'a [Segment],
    /// cos and sin of every token's position.
    pub rope: RopeTable,
}

impl<'a> Positions<'a> {
    /// The positions of a batch under a model's rotary embedding.
    pub fn new(rope: &Rope, segments: &'a [Segment]) -> Self {
        let positions = segments.iter().flat_map(|segment| segment.position..segment.position + segment.len);
        Self { segments, rope: RopeTable::new(rope, positions) }
    }
}

/// The experts that a router chose: `[T, K]` ids, -1 where a slot is unused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopkIds {
    /// The ids.
    pub ids: Vec<i32>,
    /// K.
    pub topk: usize,
}

/// A device that runs a model's steps. The model is written once over this trait.
///
/// Loading takes a part's weights as the checkpoint stores them and returns them in whatever form the backend computes
/// with. Tensors are activations `[tokens, width]`.
pub trait Backend {
    /// Activations.
    type Tensor;
    /// The embedding table, or the LM head.
    type Table;
    /// The weight of an RMS norm.
    type Norm;
    /// The weights of one attention.
    type Attention;
    /// The weights of one feed-forward part.
    type FeedForward;
    /// Keys and values of all layers and sequences.
    type Cache;

    /// Loads the embedding table or the LM head, `[vocab, d]`.
    ///
    /// # Errors
    /// If the backend cannot hold it, as for every loading step.
    fn load_table(&self, weights: &StoredLinear) -> Result<Self::Table>;
    /// Loads a norm's weight.
    ///
    /// # Errors
    /// See [`Backend::load_table`].
    fn load_norm(&self, weight: Vec<f32>) -> Result<Self::Norm>;
    /// Loads an attention.
    ///
    /// # Errors
    /// See [`Backend::load_table`].
    fn load_attention(&self, config: &Config, weights: AttentionWeights) -> Result<Self::Attention>;
    /// Loads a feed-forward part.
    ///
    /// # Errors
    /// See [`Backend::load_table`].
    fn load_feed_forward(&self, config: &Config, weights: FeedForwardWeights) -> Result<Self::FeedForward>;

    /// Makes a cache with one slot for each sequence; the slot holds that many tokens.
    ///
    /// # Errors
    /// If there is not enough memory.
    fn cache(&self, config: &Config, capacities: &[usize]) -> Result<Self::Cache>;

    /// Rows of the embedding table.
    ///
    /// # Errors
    /// If an id is out of range.
    fn embed(&self, table: &Self::Table, ids: &[u32]) -> Result<Self::Tensor>;
    /// RMS norm.
    ///
    /// # Errors
    /// If the operation refuses its arguments, as for every step.
    fn norm(&self, config: &Config, x: &Self::Tensor, norm: &Self::Norm) -> Result<Self::Tensor>;
    /// `x += y`.
    ///
    /// # Errors
    /// See [`Backend::norm`].
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;
    /// Attention of layer `layer`, from the normed residual stream to what is added to it: projections, rotation, cache
    /// write, attention, output projection.
    ///
    /// # Errors
    /// If a segment does not continue what its slot holds or passes the slot's capacity.
    fn attention(
        &self,
        config: &Config,
        weights: &Self::Attention,
        x: &Self::Tensor,
        layer: usize,
        positions: &Positions<'_>,
        cache: &mut Self::Cache,
    ) -> Result<Self::Tensor>;
    /// A feed-forward part: dense, or router, routed experts, combine and shared experts. The experts' ids are for
    /// observers; a backend on a device hands them out only if asked.
    ///
    /// # Errors
    /// See [`Backend::norm`].
    fn feed_forward(
        &self,
        config: &Config,
        weights: &Self::FeedForward,
        x: &Self::Tensor,
        want_ids: bool,
    ) -> Result<(Self::Tensor, Option<TopkIds>)>;
    /// The LM head on some rows of `x`: `[rows, vocab]` on the host.
    ///
    /// # Errors
    /// If there is no such row.
    fn logits(&self, head: &Self::Table, x: &Self::Tensor, rows: &[usize]) -> Result<Vec<f32>>;
    /// Activations on the host.
    ///
    /// # Errors
    /// If they cannot be copied.
    fn read(&self, x: &Self::Tensor) -> Result<Vec<f32>>;
}
