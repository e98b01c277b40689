//! Rotary position embedding.

use rayon::prelude::*;

use super::Real;
use crate::{Error, Result, Rope, RopeLayout, error::check_len};

/// The cosines and sines of some positions: `[positions, rotary_dim / 2]` each, times the attention factor.
#[derive(Debug, Clone)]
pub struct RopeTable {
    rope: Rope,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Computes the angles of the given positions in float32, as Transformers does.
    pub fn new(rope: &Rope, positions: impl IntoIterator<Item = usize>) -> Self {
        let frequencies = rope.frequencies();
        let factor = rope.attention_factor() as f32;
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for frequency in &frequencies {
                let angle = position as f32 * frequency;
                cos.push(angle.cos() * factor);
                sin.push(angle.sin() * factor);
            }
        }
        Self { rope: *rope, cos, sin }
    }
}

/// Rotates the elements `first..first + rotary_dim` of every head of `x` `[T, heads * head_dim]`, in place; row `t` by the
/// table's `t`-th position: `(a, b) -> (a cos - b sin, b cos + a sin)` for each pair (arXiv 2104.09864, eq. 34).
///
/// # Errors
/// [`Error::Shape`] if the table has another number of rows or the rotated part leaves the head.
pub fn rotate<T: Real>(x: &mut [T], heads: usize, head_dim: usize, first: usize, table: &RopeTable) -> Result<()> {
    let rotary_dim = table.rope.rotary_dim();
    if first + rotary_dim > head_dim {
        return Err(Error::Shape {
            operation: "rope",
            argument: "rotary_dim",
            expected: format!("at most {}", head_dim.saturating_sub(first)),
            got: rotary_dim.to_string(),
        });
    }
    let pairs = rotary_dim / 2;
    let width = heads * head_dim;
    check_len("rope", "x", x.len(), table.cos.len() / pairs * width)?;
    if width == 0 {
        return Ok(());
    }
    let angles = table.cos.par_chunks_exact(pairs).zip(table.sin.par_chunks_exact(pairs));
    x.par_chunks_exact_mut(width).zip(angles).for_each(|(row, (cos, sin))| {
        for head in row.chunks_exact_mut(head_dim) {
            let head = &mut head[first..first + rotary_dim];
            for (pair, (cos, sin)) in cos.iter().zip(sin).enumerate() {
                let (i, j) = match table.rope.layout() {
                    RopeLayout::Half => (pair, pair + pairs),
                    RopeLayout::Interleaved => (2 * pair, 2 * pair + 1),
                };
                let (cos, sin) = (T::of((*cos).into()), T::of((*sin).into()));
                (head[i], head[j]) = (head[i] * cos - head[j] * sin, head[j] * cos + head[i] * sin);
            }
        }
    });
    Ok(())
}
