//! Whether a run fits in memory, asked before it starts.

use crate::failure::Failure;
use anabranch::Dtype;
use anabranch_model::{Checkpoint, Config, Error, analysis::Analysis, memory};
use std::path::Path;

/// What a run will hold at once.
pub(crate) struct Demand {
    /// Tokens in the KV cache, of all sequences.
    pub(crate) cached_tokens: usize,
    /// Rows of logits.
    pub(crate) logit_rows: usize,
}

/// Fails if weights, cache and logits together exceed `limit`, or else what the machine has available.
pub(crate) fn check(dir: &Path, config: &Config, demand: &Demand, limit: Option<u64>) -> Result<(), Failure> {
    let Some(available) = limit.or_else(memory::available) else { return Ok(()) };
    let weights = Checkpoint::open(dir)?.total_bytes();
    // The processor caches and computes in float32.
    let cache = Analysis::new(config, demand.cached_tokens, Dtype::F32).cache.bytes;
    let logits = (demand.logit_rows as u64).saturating_mul(config.vocab_size as u64).saturating_mul(4);
    let needed = weights.saturating_add(cache).saturating_add(logits);
    if needed <= available {
        return Ok(());
    }
    let what = format!("running {} with {} tokens of context", dir.display(), demand.cached_tokens);
    Err(Error::Memory { what, needed, available }.into())
}
