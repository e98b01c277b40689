//! Combine: the weighted sum of what a token's experts answered.

use rayon::prelude::*;

use super::{Permutation, Real};
use crate::{Result, error::check_len};

/// `out[t] = sum_k weights[t, k] * y[inverse(t, k)]` (DeepSeekMoE eq. 9), k ascending, so that the order of the sum is fixed.
///
/// `y`: `[rows, d]` in permuted order; `topk_weights`: `[T, K]`. Dropped slots add nothing, whatever their weight.
///
/// # Errors
/// [`crate::Error::Shape`] if `y` or the weights do not belong to this permutation.
pub fn combine<T: Real>(y: &[T], topk_weights: &[T], permutation: &Permutation, hidden_size: usize) -> Result<Vec<T>> {
    let topk = permutation.topk();
    check_len("combine", "y", y.len(), permutation.slots().len() * hidden_size)?;
    check_len("combine", "topk_weights", topk_weights.len(), permutation.inverse().len())?;
    let mut out = vec![T::ZERO; permutation.num_tokens() * hidden_size];
    if hidden_size == 0 {
        return Ok(out);
    }
    out.par_chunks_exact_mut(hidden_size).enumerate().for_each(|(token, out)| {
        let slots = token * topk..(token + 1) * topk;
        for (row, weight) in permutation.inverse()[slots.clone()].iter().zip(&topk_weights[slots]) {
            if let Some(row) = row {
                let y = &y[row * hidden_size..][..hidden_size];
                out.iter_mut().zip(y).for_each(|(out, y)| *out += *weight * *y);
            }
        }
    });
    Ok(out)
}
