//! Drawing the next token from one row of logits.
//!
//! In this order, which is Transformers' (`GenerationMixin._get_logits_processor`):
//!
//! ```text
//! penalty      z_i <- z_i / r if z_i > 0, else z_i * r          for every distinct token i seen   (CTRL, arXiv 1909.05858, 4.1)
//! temperature  p_i  = exp(z_i / t) / sum_j exp(z_j / t)
//! top-k        keep the k most probable
//! top-p        keep the fewest most probable whose sum reaches p * what is left                   (arXiv 1904.09751, eq. 2)
//! min-p        keep those with p_i >= m * max_j p_j                                               (arXiv 2407.01082, eq. 1-2)
//! draw         the first token, by falling probability, at which the running sum passes u * what is left
//! ```
//!
//! Tokens of equal logits rank by ascending id, so that every filter keeps a definite set and top-k exactly k
//! (Transformers keeps all that tie with the k-th). Everything after the logits is float64.

use std::cmp::Ordering;

use crate::{Error, Result, Sampling};

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The token.
    pub id: u32,
    /// The probability with which it is drawn.
    pub probability: f64,
}

/// Draws the next token.
///
/// `logits` is one row, `[vocab_size]`; minus infinity marks a token that cannot be drawn. `seen` holds the ids of prompt
/// and output so far, in any order, and is read only if there is a repetition penalty. `u` is uniform in [0, 1) and does
/// not matter if the sampling is greedy. Costs O(V) if greedy, else a sort of the tokens that top-k leaves.
///
/// # Errors
/// Those of [`candidates`], and [`Error::Setting`] if `u` is not in [0, 1).
pub fn sample(sampling: &Sampling, logits: &[f32], seen: &[u32], u: f64) -> Result<u32> {
    if !(0.0..1.0).contains(&u) {
        return Err(setting("u", "at least 0 and below 1", u.to_string()));
    }
    let candidates = candidates(sampling, logits, seen)?;
    let mut sum = 0.0;
    let drawn = candidates.iter().find(|candidate| {
        sum += candidate.probability;
        sum > u
    });
    // The probabilities may sum to a little less than one, and `u` may lie between.
    let last = candidates.iter().rfind(|candidate| candidate.probability > 0.0);
    Ok(drawn.or(last).map_or(candidates[0].id, |candidate| candidate.id))
}

/// The tokens that `sampling` leaves, by falling probability; never empty, and the probabilities sum to one up to rounding.
/// Arguments and cost as for [`sample`].
///
/// # Errors
/// [`Error::Shape`] if there are no logits. [`Error::Setting`] if a logit is NaN or plus infinity or if all are minus
/// infinity: there is no distribution to draw from. [`Error::Index`] if `seen` holds an id that has no logit and there is
/// a repetition penalty.
pub fn candidates(sampling: &Sampling, logits: &[f32], seen: &[u32]) -> Result<Vec<Candidate>> {
    let mut ranked = penalized(sampling.repetition_penalty(), logits, seen)?;
    let best = ranked.iter().copied().min_by(by_rank).ok_or_else(|| Error::Shape {
        operation: "sampling",
        argument: "logits",
        expected: "at least one long".to_owned(),
        got: "none".to_owned(),
    })?;
    if best.logit == f64::NEG_INFINITY {
        return Err(setting(
            "logits",
            "above minus infinity for at least one token",
            "minus infinity for all".to_owned(),
        ));
    }
    if sampling.is_greedy() {
        return Ok(vec![Candidate { id: best.id, probability: 1.0 }]);
    }

    let top_k = sampling.top_k().unwrap_or(usize::MAX);
    if top_k < ranked.len() {
        ranked.select_nth_unstable_by(top_k, by_rank);
        ranked.truncate(top_k);
    }
    ranked.sort_unstable_by(by_rank);

    // exp((z - max) / t): relative to the best token's probability, and unable to overflow.
    let temperature = f64::from(sampling.temperature());
    let mut left: Vec<Candidate> = ranked
        .iter()
        .map(|token| Candidate { id: token.id, probability: ((token.logit - best.logit) / temperature).exp() })
        .collect();

    if sampling.top_p() < 1.0 {
        let mass = f64::from(sampling.top_p()) * total(&left);
        let mut sum = 0.0;
        let short_of_mass = left.iter().take_while(|candidate| {
            sum += candidate.probability;
            sum < mass
        });
        let kept = short_of_mass.count() + 1;
        left.truncate(kept);
    }
    let min_p = f64::from(sampling.min_p());
    let kept = left.partition_point(|candidate| candidate.probability >= min_p);
    left.truncate(kept);

    let total = total(&left);
    for candidate in &mut left {
        candidate.probability /= total;
    }
    Ok(left)
}

/// A token and its logit, after the penalty.
#[derive(Clone, Copy)]
struct Ranked {
    id: u32,
    logit: f64,
}

/// The higher logit first; of equal ones, the lower id.
fn by_rank(a: &Ranked, b: &Ranked) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.probability).sum()
}

/// The logits after the repetition penalty, with their ids.
fn penalized(penalty: f32, logits: &[f32], seen: &[u32]) -> Result<Vec<Ranked>> {
    let mut ranked = Vec::with_capacity(logits.len());
    for (id, &logit) in logits.iter().enumerate() {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(setting("logits", "free of NaN and plus infinity", format!("{logit} for token {id}")));
        }
        // Adding zero makes -0 and 0 rank as the equals that they are.
        ranked.push(Ranked { id: id as u32, logit: f64::from(logit) + 0.0 });
    }
    if penalty == 1.0 {
        return Ok(ranked);
    }
    let penalty = f64::from(penalty);
    let mut done = vec![false; logits.len()];
    for &id in seen {
        let index = id as usize;
        let Some(done) = done.get_mut(index) else {
            return Err(Error::Index { operation: "sampling", argument: "seen", limit: logits.len(), got: id.into() });
        };
        if !std::mem::replace(done, true) {
            let logit = &mut ranked[index].logit;
            *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        }
    }
    Ok(ranked)
}

fn setting(setting: &'static str, expected: &str, got: String) -> Error {
    Error::Setting { operation: "sampling", setting, expected: expected.to_owned(), got }
}
