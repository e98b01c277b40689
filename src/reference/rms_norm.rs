//! RMS norm.

use rayon::prelude::*;

use super::Real;
use crate::{Error, Result, error::check_len};

/// `y = x / sqrt(mean(x^2) + eps) * weight` over rows as long as `weight` (arXiv 1910.07467).
///
/// # Errors
/// [`Error::Shape`] if `x` is not whole rows.
pub fn rms_norm<T: Real>(x: &[T], weight: &[f32], eps: f32) -> Result<Vec<T>> {
    let width = weight.len();
    if width == 0 {
        return Err(Error::Shape {
            operation: "rms_norm",
            argument: "weight",
            expected: "at least one element".into(),
            got: "none".into(),
        });
    }
    check_len("rms_norm", "x", x.len(), x.len() / width * width)?;
    let mut y = x.to_vec();
    y.par_chunks_exact_mut(width).for_each(|row| {
        let mean = row.iter().map(|x| *x * *x).sum::<T>() / T::of(width as f64);
        let scale = T::ONE / (mean + T::of(eps.into())).sqrt();
        row.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * scale * T::of((*weight).into()));
    });
    Ok(y)
}
