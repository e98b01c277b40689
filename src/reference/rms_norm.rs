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
    y.par_chunks_exact_mut(width).for_each(|row| norm(row, weight, eps));
    Ok(y)
}

/// [`rms_norm`], in place, of the first elements of every head of `x` `[.., head_dim]`, as many as `weight` has: of queries and
/// keys before they are rotated, or of a cached row's latent, which its rotated part follows.
///
/// # Errors
/// [`Error::Shape`] if `weight` is empty or longer than a head, or `x` is not whole heads.
pub fn rms_norm_heads<T: Real>(x: &mut [T], head_dim: usize, weight: &[f32], eps: f32) -> Result<()> {
    if !(1..=head_dim).contains(&weight.len()) {
        return Err(Error::Shape {
            operation: "rms_norm",
            argument: "weight",
            expected: format!("1 to {head_dim} long"),
            got: weight.len().to_string(),
        });
    }
    check_len("rms_norm", "x", x.len(), x.len() / head_dim * head_dim)?;
    x.par_chunks_exact_mut(head_dim).for_each(|head| norm(&mut head[..weight.len()], weight, eps));
    Ok(())
}

fn norm<T: Real>(row: &mut [T], weight: &[f32], eps: f32) {
    let mean = row.iter().map(|x| *x * *x).sum::<T>() / T::of(row.len() as f64);
    let scale = T::ONE / (mean + T::of(eps.into())).sqrt();
    row.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * scale * T::of((*weight).into()));
}
