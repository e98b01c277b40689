//! What a device does for a model: whole steps, coarse enough that a backend may fuse inside each.

use anabranch::{Sampling, reference::sample};

use crate::{
    Config, Error, Result,
    weights::{AttentionWeights, FeedForwardWeights, StoredLinear},
};

/// Consecutive tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment<'a> {
    /// The sequence's blocks in the cache, in order: position `p` lies in block `blocks[p / BLOCK_SIZE]`, row `p % BLOCK_SIZE`
    /// ([`BLOCK_SIZE`](crate::BLOCK_SIZE)). Blocks before the first token are only read, so that sequences may share them.
    pub blocks: &'a [u32],
    /// Position of the first token. Whatever its blocks hold from here on is overwritten.
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
    pub segments: &'a [Segment<'a>],
}

/// The experts that a router chose: `[T, K]` ids, -1 where a slot is unused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopkIds {
    /// The ids.
    pub ids: Vec<i32>,
    /// K.
    pub topk: usize,
}

/// What a layer's router is told and asked.
#[derive(Debug, Default)]
pub struct Routed<'a> {
    /// The experts to take instead of the router's choice, `[T, K]`; they get the weights that the router's scores give them.
    pub given: Option<&'a TopkIds>,
    /// Whether to say which experts were taken, and by what: on a device that costs a wait.
    pub wanted: bool,
    /// If wanted and the layer has experts: those that were taken, and the router's logits `[T, E]`.
    pub taken: Option<(TopkIds, Vec<f32>)>,
}

/// Refuses a row that hidden states do not have.
pub(crate) fn check_row(row: usize, rows: usize) -> Result<()> {
    if row < rows {
        return Ok(());
    }
    Err(Error::Input(format!("row {row} of {rows} rows of hidden states does not exist")))
}

/// The token of each row of logits that is the most probable, or why there is none.
pub(crate) fn most_probable(logits: &[f32], vocab_size: usize) -> Vec<Result<u32>> {
    let rows = logits.chunks_exact(vocab_size.max(1));
    rows.map(|row| Ok(sample(&Sampling::greedy(), row, &[], 0.0)?)).collect()
}

/// A device that runs a model's steps. The model is written once over this trait.
///
/// Loading takes a part's weights as they come and returns them in whatever form the backend computes with. A pass begins with
/// [`Backend::embed`], adds to the residual stream with the steps in between, and is read at its end. Everything that a pass works with
/// lies in the cache, which a backend may thus keep from one pass to the next.
pub trait Backend {
    /// Hidden states after the final norm, `[tokens, d]`.
    type Hidden;
    /// The embedding table, or the LM head.
    type Table;
    /// The weight of an RMS norm.
    type Norm;
    /// The weights of one attention.
    type Attention;
    /// The weights of one feed-forward part.
    type FeedForward;
    /// Keys and values of all layers, in blocks, with the activations of the pass under way.
    type Cache;

    /// Told before anything is loaded: the place to refuse a model that does not fit.
    ///
    /// # Errors
    /// If the backend cannot hold or run it.
    fn prepare(&self, config: &Config) -> Result<()>;
    /// Loads the embedding table or the LM head, `[vocab, d]`.
    ///
    /// # Errors
    /// If the backend cannot hold it, as for every loading step.
    fn load_table(&self, weights: &StoredLinear) -> Result<Self::Table>;
    /// Loads the weight of a norm of the residual stream.
    ///
    /// # Errors
    /// See [`Backend::load_table`].
    fn load_norm(&self, config: &Config, weight: Vec<f32>) -> Result<Self::Norm>;
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

    /// Told after everything is loaded: weights are where they belong from here on, and what brought them there can go.
    ///
    /// # Errors
    /// If they did not get there.
    fn loaded(&self) -> Result<()> {
        Ok(())
    }

    /// Makes a cache of so many blocks of [`BLOCK_SIZE`](crate::BLOCK_SIZE) tokens.
    ///
    /// # Errors
    /// If there is not enough memory.
    fn cache(&self, config: &Config, blocks: usize) -> Result<Self::Cache>;

    /// Begins a pass over a batch whose lengths agree: `x = table[ids]`.
    ///
    /// # Errors
    /// If a segment does not continue what its blocks hold or passes their end, or two write to the same block.
    fn embed(&self, config: &Config, table: &Self::Table, batch: &Batch<'_>, cache: &mut Self::Cache) -> Result<()>;
    /// `x += attention(norm(x))` in layer `layer`: norm, projections, rotation, cache write, attention, output projection.
    ///
    /// # Errors
    /// If an operation refuses its arguments, as for every step.
    fn attention(
        &self,
        config: &Config,
        norm: &Self::Norm,
        weights: &Self::Attention,
        layer: usize,
        cache: &mut Self::Cache,
    ) -> Result<()>;
    /// `x += feed_forward(norm(x))`: dense, or router, routed experts, combine and shared experts.
    ///
    /// # Errors
    /// See [`Backend::attention`].
    fn feed_forward(
        &self,
        config: &Config,
        norm: &Self::Norm,
        weights: &Self::FeedForward,
        routing: &mut Routed<'_>,
        cache: &mut Self::Cache,
    ) -> Result<()>;

    /// The residual stream x on the host, `[tokens, d]`.
    ///
    /// # Errors
    /// If it cannot be copied.
    fn residual(&self, config: &Config, cache: &mut Self::Cache) -> Result<Vec<f32>>;
    /// Ends a pass: `norm(x)`, which outlives the pass.
    ///
    /// # Errors
    /// See [`Backend::attention`], and if there is not enough memory.
    fn hidden(&self, config: &Config, norm: &Self::Norm, cache: &mut Self::Cache) -> Result<Self::Hidden>;
    /// Hidden states on the host.
    ///
    /// # Errors
    /// If they cannot be copied.
    fn read(&self, config: &Config, hidden: &Self::Hidden) -> Result<Vec<f32>>;
    /// The LM head on some rows of hidden states: `[rows, vocab]` on the host.
    ///
    /// # Errors
    /// If there is no such row.
    fn logits(&self, config: &Config, head: &Self::Table, hidden: &Self::Hidden, rows: &[usize]) -> Result<Vec<f32>>;
    /// Ends a pass with the logits of some of its tokens: final norm and LM head in one step, for which a backend may keep buffers.
    ///
    /// # Errors
    /// See [`Backend::logits`].
    fn last_logits(
        &self,
        config: &Config,
        norm: &Self::Norm,
        head: &Self::Table,
        rows: &[usize],
        cache: &mut Self::Cache,
    ) -> Result<Vec<f32>> {
        let hidden = self.hidden(config, norm, cache)?;
        self.logits(config, head, &hidden, rows)
    }
    /// [`Backend::last_logits`], of whose rows it returns what [`sample`] makes of them with [`Sampling::greedy`].
    ///
    /// # Errors
    /// Those of [`Backend::last_logits`]. A row without a distribution is its own error.
    fn last_tokens(
        &self,
        config: &Config,
        norm: &Self::Norm,
        head: &Self::Table,
        rows: &[usize],
        cache: &mut Self::Cache,
    ) -> Result<Vec<Result<u32>>> {
        Ok(most_probable(&self.last_logits(config, norm, head, rows, cache)?, config.vocab_size))
    }

    /// Announces a pass that ends with [`Backend::last_logits`] or [`Backend::last_tokens`] of each segment's last token, and that
    /// nobody looks at on its way: a backend may have recorded it. True if it did and runs it, so that the steps from
    /// [`Backend::embed`] on are to be left out.
    ///
    /// # Errors
    /// Those of [`Backend::embed`].
    fn replay(&self, batch: &Batch<'_>, cache: &mut Self::Cache) -> Result<bool> {
        let _ = (batch, cache);
        Ok(false)
    }
}
