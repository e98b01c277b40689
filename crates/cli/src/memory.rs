//! Whether a run fits in memory, asked before it starts.

use crate::{device::Place, failure::Failure, source::Source};
use anabranch_model::{Config, Error, analysis::Analysis};

/// What a run will hold at once.
pub(crate) struct Demand {
    /// Tokens in the KV cache, of all sequences.
    pub(crate) cached_tokens: usize,
    /// Rows of logits.
    pub(crate) logit_rows: usize,
}

/// Fails if weights, cache and logits together exceed `limit`, or else what the place has available.
pub(crate) fn check<P: Place>(
    source: &Source,
    config: &Config,
    demand: &Demand,
    limit: Option<u64>,
) -> Result<(), Failure> {
    let Some(available) = limit.or_else(P::available) else { return Ok(()) };
    let weights = P::weight_bytes(source, config)?;
    let cache = Analysis::new(config, demand.cached_tokens, P::CACHED).cache.bytes;
    let logits = (demand.logit_rows as u64).saturating_mul(config.vocab_size as u64).saturating_mul(4);
    let needed = weights.saturating_add(cache).saturating_add(logits);
    if needed <= available {
        return Ok(());
    }
    let what = format!("running {} with {} tokens of context", source.name(), demand.cached_tokens);
    Err(Error::Memory { what, needed, available }.into())
}
