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

/// `exp(l_i - max) / sum_j exp(l_j - max)`.
pub(super) fn softmax<T: Real>(logits: &[T]) -> Vec<T> {
    let max = logits.iter().copied().fold(T::NEG_INFINITY, |max, logit| if logit > max { logit } else { max });
    let mut scores: Vec<T> = logits.iter().map(|logit| (*logit - max).exp()).collect();
    let sum: T = scores.iter().copied().sum();
    scores.iter_mut().for_each(|score| *score = *score / sum);
    scores
}
