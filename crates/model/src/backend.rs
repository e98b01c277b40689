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

/// How the token after a segment is drawn: the arguments of [`sample`] beside the logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw<'a> {
    /// The rule.
    pub sampling: Sampling,
    /// Ids of prompt and output so far, in any order; read only if there is a repetition penalty.
    pub seen: &'a [u32],
    /// Uniform in [0, 1); does not matter if the sampling is greedy.
    pub u: f64,
}

impl Draw<'_> {
    /// The most probable token.
    pub fn greedy() -> Self {
        Self { sampling: Sampling::greedy(), seen: &[], u: 0.0 }
    }

    /// What [`sample`] draws from a row of logits.
    ///
    /// # Errors
    /// Those of [`sample`].
    pub fn token(&self, logits: &[f32]) -> Result<u32> {
        Ok(sample(&self.sampling, logits, self.seen, self.u)?)
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

/// The token of each row of logits, or why there is none.
pub(crate) fn draw_rows(logits: &[f32], vocab_size: usize, draws: &[Draw<'_>]) -> Result<Vec<Result<u32>>> {
    if logits.len() != draws.len().saturating_mul(vocab_size) {
        let expected = format!("{} rows of {vocab_size}", draws.len());
        let (operation, argument, got) = ("sampling", "logits", format!("{} numbers", logits.len()));
        return Err(anabranch::Error::Shape { operation, argument, expected, got }.into());
    }
    let rows = logits.chunks_exact(vocab_size.max(1));
    Ok(rows.zip(draws).map(|(row, draw)| draw.token(row)).collect())
}

/// A layer of a model on a backend: norm, attention, norm, feed-forward, each pair added to the residual stream.
pub struct Block<B: Backend + ?Sized> {
    /// Before the attention.
    pub attention_norm: B::Norm,
    /// The attention.
    pub attention: B::Attention,
    /// Before the feed-forward part.
    pub feed_forward_norm: B::Norm,
    /// The feed-forward part.
    pub feed_forward: B::FeedForward,
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

    /// All blocks at once, from [`Backend::embed`] on, where a backend has a way of its own to do that for a pass: true if it did, false
    /// if the blocks are to be run step by step. Nobody looks at such a pass on its way.
    ///
    /// # Errors
    /// See [`Backend::attention`].
    fn decode(&self, config: &Config, blocks: &[Block<Self>], cache: &mut Self::Cache) -> Result<bool> {
        let _ = (config, blocks, cache);
        Ok(false)
    }

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
    /// [`Backend::last_logits`], of whose rows it returns the tokens that are drawn from them, each by its own rule: a backend may
    /// draw where the logits are.
    ///
    /// # Errors
    /// Those of [`Backend::last_logits`], and if there are not as many draws as rows. A row without a distribution is its own error.
    fn last_tokens(
        &self,
        config: &Config,
        norm: &Self::Norm,
        head: &Self::Table,
        rows: &[usize],
        draws: &[Draw<'_>],
        cache: &mut Self::Cache,
    ) -> Result<Vec<Result<u32>>> {
        draw_rows(&self.last_logits(config, norm, head, rows, cache)?, config.vocab_size, draws)
    }

    /// Announces a pass that nobody looks at on its way, and how it ends with each segment's last token: with these draws by
    /// [`Backend::last_tokens`], or without any by [`Backend::last_logits`]. A backend may have recorded it. True if it did and runs
    /// it, so that the steps from [`Backend::embed`] on are to be left out.
    ///
    /// # Errors
    /// Those of [`Backend::embed`] and [`Backend::last_tokens`].
    fn replay(&self, batch: &Batch<'_>, draws: &[Draw<'_>], cache: &mut Self::Cache) -> Result<bool> {
        let _ = (batch, draws, cache);
        Ok(false)
    }
}
