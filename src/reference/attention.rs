//! Causal attention over a KV cache.

use rayon::prelude::*;

use super::{Real, View, matmul};
use crate::{Error, Result, error::check_len};

/// The shape of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; query head `h` reads key head `h * num_kv_heads / num_heads` (GQA, arXiv 2305.13245).
    pub num_kv_heads: usize,
    /// Elements of a query and key head.
    pub key_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Multiplies the scores, usually `key_dim^(-1/2)`.
    pub scale: f32,
}

/// Queries that share one pass over the keys.
const QUERY_BLOCK: usize = 64;

/// `softmax(scale q K^T + causal mask) V` (arXiv 1706.03762, eq. 1) for the last tokens of one sequence.
///
/// - `q`: `[T, num_heads * key_dim]`, the queries of the sequence's last `T` tokens, rotated.
/// - `keys`, `values`: `S` rows of `stride` elements, of which the first `num_kv_heads * key_dim` (`value_dim`) are used;
///   row `s` is position `s`. One buffer may serve as both, which is how latent attention reads its cache.
///
/// Query `i` sees positions `0..=S - T + i`. Returns `[T, num_heads * value_dim]`. In parallel over heads and blocks of queries.
///
/// # Errors
/// [`Error::Shape`] if the lengths do not fit each other or heads do not divide.
pub fn attention<T: Real>(
    shape: &AttentionShape,
    q: &[T],
    [keys, values]: [&[T]; 2],
    [key_stride, value_stride]: [usize; 2],
) -> Result<Vec<T>> {
    let AttentionShape { num_heads, num_kv_heads, key_dim, value_dim, scale } = *shape;
    if num_heads == 0 || num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) || key_dim == 0 || value_dim == 0
    {
        return Err(Error::Shape {
            operation: "attention",
            argument: "heads",
            expected: "a multiple of the key heads, with at least one element each".into(),
            got: format!("{num_heads} query heads of {key_dim}, {num_kv_heads} key heads with values of {value_dim}"),
        });
    }
    let tokens = q.len() / (num_heads * key_dim);
    let length = keys.len().checked_div(key_stride).unwrap_or(0);
    check_len("attention", "q", q.len(), tokens * num_heads * key_dim)?;
    check_len("attention", "keys", keys.len(), length * key_stride)?;
    check_len("attention", "values", values.len(), length * value_stride)?;
    if tokens > length || num_kv_heads * key_dim > key_stride || num_kv_heads * value_dim > value_stride {
        return Err(Error::Shape {
            operation: "attention",
            argument: "keys and values",
            expected: format!("at least {tokens} rows that hold {num_kv_heads} heads"),
            got: format!("{length} rows of {key_stride} and {value_stride}"),
        });
    }
    let width = num_heads * value_dim;
    let mut out = vec![T::ZERO; tokens * width];
    out.par_chunks_mut(QUERY_BLOCK * width).enumerate().for_each(|(block, out)| {
        let first = block * QUERY_BLOCK;
        let rows = out.len() / width;
        let seen = length - tokens + first + rows;
        let heads: Vec<Vec<T>> = (0..num_heads)
            .into_par_iter()
            .map(|head| {
                let kv_head = head * num_kv_heads / num_heads;
                let q = View { data: &q[(first * num_heads + head) * key_dim..], stride: [num_heads * key_dim, 1] };
                let k = View { data: &keys[kv_head * key_dim..], stride: [1, key_stride] };
                let v = View { data: &values[kv_head * value_dim..], stride: [value_stride, 1] };
                let mut scores = vec![T::ZERO; rows * seen];
                matmul([rows, seen, key_dim], q, k, &mut scores);
                for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
                    let (visible, masked) = scores.split_at_mut(seen - rows + row + 1);
                    softmax(visible, T::of(scale.into()));
                    masked.fill(T::ZERO);
                }
                let mut y = vec![T::ZERO; rows * value_dim];
                matmul([rows, value_dim, seen], View { data: &scores, stride: [seen, 1] }, v, &mut y);
                y
            })
            .collect();
        for (row, out) in out.chunks_exact_mut(width).enumerate() {
            for (head, out) in out.chunks_exact_mut(value_dim).enumerate() {
                out.copy_from_slice(&heads[head][row * value_dim..][..value_dim]);
            }
        }
    });
    Ok(out)
}

fn softmax<T: Real>(scores: &mut [T], scale: T) {
    scores.iter_mut().for_each(|score| *score *= scale);
    let max = scores.iter().copied().fold(T::NEG_INFINITY, |max, score| if score > max { score } else { max });
    let mut sum = T::ZERO;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score = *score / sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize, seed: u64) -> Vec<f64> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 31) - 0.5
        };
        (0..count).map(|_| next()).collect()
    }

    /// Against the formula written out, token by token, over several blocks of queries.
    #[test]
    fn matches_the_formula() {
        let shape = AttentionShape { num_heads: 4, num_kv_heads: 2, key_dim: 3, value_dim: 5, scale: 0.7 };
        let (tokens, length) = (130, 137);
        let (q, k, v) = (noise(tokens * 12, 1), noise(length * 6, 2), noise(length * 10, 3));
        let out = attention(&shape, &q, [&k, &v], [6, 10]).unwrap();
        for t in 0..tokens {
            for h in 0..4 {
                let score = |s: usize| -> f64 {
                    let dot: f64 = (0..3).map(|i| q[t * 12 + h * 3 + i] * k[s * 6 + h / 2 * 3 + i]).sum();
                    (dot * f64::from(0.7f32)).exp()
                };
                let seen = length - tokens + t + 1;
                let total: f64 = (0..seen).map(score).sum();
                for i in 0..5 {
                    let y: f64 = (0..seen).map(|s| score(s) / total * v[s * 10 + h / 2 * 5 + i]).sum();
                    assert!((out[t * 20 + h * 5 + i] - y).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn contradictory_shapes_are_refused() {
        let shape = AttentionShape { num_heads: 3, num_kv_heads: 2, key_dim: 1, value_dim: 1, scale: 1.0 };
        assert!(attention(&shape, &[0.0f32; 3], [&[0.0; 2], &[0.0; 2]], [2, 2]).is_err());
        let shape = AttentionShape { num_heads: 2, ..shape };
        assert!(attention(&shape, &[0.0f32; 4], [&[0.0; 2], &[0.0; 2]], [2, 2]).is_err());
        assert!(attention(&shape, &[0.0f32; 2], [&[0.0; 2], &[0.0; 2]], [2, 0]).is_err());
    }
}
