//! Logits to scores.

use crate::{Score, reference::Real};

/// Scores of one token's `[E]` logits. For [`Score::TopkSoftmax`] these are the softmax over all experts, which
/// balancing losses use; the weights are the softmax over the chosen ones.
pub fn scores<T: Real>(score: Score, logits: &[T]) -> Vec<T> {
    match score {
        Score::Softmax | Score::TopkSoftmax => softmax(logits),
        Score::Sigmoid => logits.iter().map(|logit| T::ONE / (T::ONE + (-*logit).exp())).collect(),
    }
}

/// `exp(l_i - max) / sum_j exp(l_j - max)`. The sum is float64: added up one by one in float32, 1,024 terms round to a weight that is off
/// by 3e-6, more than the exponentials and the division together.
pub(super) fn softmax<T: Real>(logits: &[T]) -> Vec<T> {
    let max = logits.iter().copied().fold(T::NEG_INFINITY, |max, logit| if logit > max { logit } else { max });
    let mut scores: Vec<T> = logits.iter().map(|logit| (*logit - max).exp()).collect();
    let sum = T::of(scores.iter().map(|score| score.to_f64()).sum());
    scores.iter_mut().for_each(|score| *score = *score / sum);
    scores
}
