//! Adaptive k: easy tokens visit fewer experts.

use super::score::softmax;
use crate::reference::Real;

/// `clamp(floor(complexity * topk), 1, topk)`.
pub(super) fn slots(complexity: f64, topk: usize) -> usize {
    // A float to integer cast saturates and takes NaN to 0.
    ((complexity * topk as f64).floor() as usize).clamp(1, topk)
}

/// Entropy of `softmax(logits)` divided by its largest value `ln E`; 0 for a single expert.
pub(super) fn normalized_entropy<T: Real>(logits: &[T]) -> f64 {
    if logits.len() < 2 {
        return 0.0;
    }
    let terms = softmax(logits).into_iter().map(|p| if p == T::ZERO { T::ZERO } else { -(p * p.ln()) });
    terms.map(T::to_f64).sum::<f64>() / (logits.len() as f64).ln()
}
