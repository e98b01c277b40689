//! The router: from logits to expert ids and weights.
//!
//! ```text
//! scores = softmax(logits) | sigmoid(logits)                     DeepSeekMoE eq. 11, DeepSeek-V3 eq. 15
//! select = scores + bias, minus infinity outside the best groups  DeepSeek-V3 eq. 16, DeepSeek-V2 section 2.2.2
//! ids    = top-k of select, ties to the lower id
//! w      = scores[ids], renormalised or not, times the routed scaling factor
//! ```

mod adaptive;
mod capacity;
mod score;
mod select;

pub use score::scores;

use super::Real;
use crate::{Adaptive, Error, Renormalize, Result, Routing, Score, error::check_len};

/// Which experts every token visits, and with what weight.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterOutput<T> {
    /// `[T, K]`, descending by selection score; -1 where a slot is unused or the token was dropped.
    pub topk_ids: Vec<i32>,
    /// `[T, K]`; 0 where the id is -1.
    pub topk_weights: Vec<T>,
    /// `[E]`: tokens per expert, dropped ones not counted.
    pub expert_counts: Vec<u32>,
}

/// Routes every token.
///
/// - `logits`: `[T, E]`, the gate product with the gate's bias already added.
/// - `selection_bias`: `[E]`, steers the choice but never the weights (`e_score_correction_bias`).
/// - `complexity`: `[T]` in [0, 1], for [`Adaptive::Complexity`] only.
///
/// Where the scores rise with the logits and nothing is added to them (no bias, groups scored by their maximum), experts are ranked
/// by logits, so that the rounding of exp cannot reorder them; else by `scores + bias`.
///
/// NaN: a NaN among a token's logits ranks as minus infinity and makes all weights of this token NaN; its ids are
/// distinct and valid, and no other token changes. The same holds where softmax itself is undefined (an infinite logit).
/// A NaN complexity counts as 0.
///
/// # Errors
/// [`Error::Shape`] if a length does not fit, [`Error::Setting`] if a complexity is missing or given in vain.
pub fn router<T: Real>(
    routing: &Routing,
    logits: &[T],
    selection_bias: Option<&[f32]>,
    complexity: Option<&[f32]>,
) -> Result<RouterOutput<T>> {
    let (num_experts, topk) = (routing.num_experts(), routing.topk());
    let num_tokens = logits.len() / num_experts;
    check_len("router", "logits", logits.len(), num_tokens * num_experts)?;
    if let Some(bias) = selection_bias {
        check_len("router", "selection_bias", bias.len(), num_experts)?;
    }
    if let Some(complexity) = complexity {
        check_len("router", "complexity", complexity.len(), num_tokens)?;
    }
    if complexity.is_some() != (routing.adaptive() == Adaptive::Complexity) {
        let (expected, got) = if complexity.is_some() { ("absent", "given") } else { ("given", "absent") };
        return Err(Error::Setting {
            operation: "router",
            setting: "complexity",
            expected: format!("{expected} with Adaptive::{:?}", routing.adaptive()),
            got: got.to_owned(),
        });
    }

    let mut topk_ids = vec![-1; num_tokens * topk];
    let mut topk_weights = vec![T::ZERO; num_tokens * topk];
    let tokens =
        logits.chunks_exact(num_experts).zip(topk_ids.chunks_exact_mut(topk)).zip(topk_weights.chunks_exact_mut(topk));
    for (token, ((logits, ids), weights)) in tokens.enumerate() {
        let used = match routing.adaptive() {
            Adaptive::Fixed => topk,
            Adaptive::Complexity => adaptive::slots(complexity.map_or(0.0, |c| c[token]).into(), topk),
            Adaptive::Entropy => adaptive::slots(adaptive::normalized_entropy(logits), topk),
        };
        let (ids, weights) = (&mut ids[..used], &mut weights[..used]);
        let scores = scores(routing.score(), logits);
        let select = select::selection_scores(routing, logits, &scores, selection_bias);
        select::top(&select, ids);
        weigh(routing, logits, &scores, ids, weights);
    }
    if let Some(capacity) = routing.expert_capacity(num_tokens) {
        capacity::drop_overflow(capacity, num_experts, topk, &mut topk_ids, &mut topk_weights);
    }
    let mut expert_counts = vec![0; num_experts];
    topk_ids.iter().filter(|id| **id >= 0).for_each(|id| expert_counts[*id as usize] += 1);
    Ok(RouterOutput { topk_ids, topk_weights, expert_counts })
}

/// The weights that [`router`] would give experts chosen elsewhere: `topk_ids` `[T, K]`, -1 for an unused slot.
///
/// # Errors
/// [`Error::Shape`] if a length does not fit, [`Error::Index`] if an id is no expert's.
pub fn topk_weights<T: Real>(routing: &Routing, logits: &[T], topk_ids: &[i32]) -> Result<Vec<T>> {
    let (num_experts, topk) = (routing.num_experts(), routing.topk());
    let num_tokens = logits.len() / num_experts;
    check_len("topk_weights", "logits", logits.len(), num_tokens * num_experts)?;
    check_len("topk_weights", "topk_ids", topk_ids.len(), num_tokens * topk)?;
    if let Some(id) = topk_ids.iter().find(|id| **id >= num_experts as i32) {
        let (operation, argument, got) = ("topk_weights", "topk_ids", i64::from(*id));
        return Err(Error::Index { operation, argument, limit: num_experts, got });
    }
    let mut topk_weights = vec![T::ZERO; topk_ids.len()];
    let tokens = topk_ids.chunks_exact(topk).zip(topk_weights.chunks_exact_mut(topk));
    for (logits, (ids, weights)) in logits.chunks_exact(num_experts).zip(tokens) {
        let used: Vec<usize> = (0..topk).filter(|slot| ids[*slot] >= 0).collect();
        let chosen: Vec<i32> = used.iter().map(|slot| ids[*slot]).collect();
        let mut weighed = vec![T::ZERO; chosen.len()];
        weigh(routing, logits, &scores(routing.score(), logits), &chosen, &mut weighed);
        used.iter().zip(weighed).for_each(|(slot, weight)| weights[*slot] = weight);
    }
    Ok(topk_weights)
}

/// The weights of the chosen experts.
fn weigh<T: Real>(routing: &Routing, logits: &[T], scores: &[T], ids: &[i32], weights: &mut [T]) {
    if logits.iter().any(|logit| logit.is_nan()) {
        weights.fill(T::NAN);
        return;
    }
    if routing.score() == Score::TopkSoftmax {
        let chosen: Vec<T> = ids.iter().map(|id| logits[*id as usize]).collect();
        weights.copy_from_slice(&score::softmax(&chosen));
    } else {
        weights.iter_mut().zip(ids).for_each(|(weight, id)| *weight = scores[*id as usize]);
        if routing.renormalize() == Renormalize::Sum {
            let sum = weights.iter().copied().sum::<T>() + T::of(1e-20);
            weights.iter_mut().for_each(|weight| *weight = *weight / sum);
        }
    }
    let scale = T::of(routing.scale().into());
    weights.iter_mut().for_each(|weight| *weight *= scale);
}
