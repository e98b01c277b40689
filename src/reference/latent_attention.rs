//! Multi-head latent attention (MLA) in its absorbed form.

use rayon::prelude::*;

use super::{AttentionShape, Real, View, attention, matmul};
use crate::{Error, Result, error::check_len};

/// The shape of a latent attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentShape {
    /// Query heads.
    pub num_heads: usize,
    /// Width of the latent.
    pub kv_lora_rank: usize,
    /// Elements of a query head without position.
    pub qk_nope_head_dim: usize,
    /// Elements with position; the key's are shared by all heads.
    pub qk_rope_head_dim: usize,
    /// Elements of a value head.
    pub v_head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
}

/// Attention over a cache of latents (DeepSeek-V2, arXiv 2405.04434, eq. 37-47).
///
/// Keys and values are never expanded: with `[k_nope; v] = W_b c` for each head, `q_nope . k_nope = (W_bk^T q_nope) . c`, so every
/// head is a query over the same cache row `[c; k_pe]`, and the average of the latents is projected by `W_bv` at the end.
///
/// - `q`: `[T, heads * (nope + rope)]`, the rope part rotated.
/// - `cache`: `[S, kv_lora_rank + rope]`: the normed latent, then the rotated shared key.
/// - `kv_b`: `[heads * (nope + v), kv_lora_rank]`, for each head the rows of its keys, then of its values.
///
/// Returns `[T, heads * v_head_dim]`; the queries are those of the last `T` positions.
///
/// # Errors
/// [`crate::Error::Shape`] if the lengths do not fit each other.
pub fn latent_attention<T: Real>(shape: &LatentShape, q: &[T], cache: &[T], kv_b: &[T]) -> Result<Vec<T>> {
    let LatentShape { num_heads, kv_lora_rank: rank, qk_nope_head_dim: nope, .. } = *shape;
    let (rope, v) = (shape.qk_rope_head_dim, shape.v_head_dim);
    let query_width = num_heads * (nope + rope);
    if query_width == 0 || rank == 0 || v == 0 {
        return Err(Error::Shape {
            operation: "latent_attention",
            argument: "heads",
            expected: "at least one element in every part".into(),
            got: format!("{num_heads} heads of {nope}+{rope}, latents of {rank}, values of {v}"),
        });
    }
    let tokens = q.len() / query_width;
    check_len("latent_attention", "q", q.len(), tokens * query_width)?;
    check_len("latent_attention", "kv_b", kv_b.len(), num_heads * (nope + v) * rank)?;

    let cache_width = rank + rope;
    // Head-major [heads, T, rank + rope], so that each head's product lands in one piece, then token-major.
    let absorbed: Vec<Vec<T>> = (0..num_heads)
        .into_par_iter()
        .map(|head| {
            let mut latent = vec![T::ZERO; tokens * rank];
            if tokens > 0 {
                let q = View { data: &q[head * (nope + rope)..], stride: [query_width, 1] };
                let keys = View { data: &kv_b[head * (nope + v) * rank..], stride: [rank, 1] };
                matmul([tokens, rank, nope], q, keys, &mut latent);
            }
            latent
        })
        .collect();
    let mut queries = Vec::with_capacity(tokens * num_heads * cache_width);
    for (token, q) in q.chunks_exact(query_width).enumerate() {
        for (head, q) in q.chunks_exact(nope + rope).enumerate() {
            queries.extend_from_slice(&absorbed[head][token * rank..(token + 1) * rank]);
            queries.extend_from_slice(&q[nope..]);
        }
    }
    let shape =
        AttentionShape { num_heads, num_kv_heads: 1, key_dim: cache_width, value_dim: rank, scale: shape.scale };
    let latents = attention(&shape, &queries, [cache, cache], [cache_width, cache_width])?;

    let values: Vec<Vec<T>> = (0..num_heads)
        .into_par_iter()
        .map(|head| {
            let mut y = vec![T::ZERO; tokens * v];
            if tokens > 0 {
                let latents = View { data: &latents[head * rank..], stride: [num_heads * rank, 1] };
                let project = View { data: &kv_b[(head * (nope + v) + nope) * rank..], stride: [1, rank] };
                matmul([tokens, v, rank], latents, project, &mut y);
            }
            y
        })
        .collect();
    let mut out = Vec::with_capacity(tokens * num_heads * v);
    for token in 0..tokens {
        for head in &values {
            out.extend_from_slice(&head[token * v..(token + 1) * v]);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The absorbed form equals attention over keys and values that were expanded first.
    #[test]
    fn absorbing_changes_nothing() {
        let shape = LatentShape {
            num_heads: 3,
            kv_lora_rank: 6,
            qk_nope_head_dim: 4,
            qk_rope_head_dim: 2,
            v_head_dim: 5,
            scale: 0.5,
        };
        let (tokens, length) = (4, 9);
        let wave = |count: usize, step: f64| (0..count).map(|i| (i as f64 * step).sin()).collect::<Vec<_>>();
        let (q, cache, kv_b) = (wave(tokens * 18, 0.7), wave(length * 8, 1.3), wave(27 * 6, 2.1));
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for row in cache.chunks_exact(8) {
            for head in 0..3 {
                let expand = |i: usize| (0..6).map(|r| kv_b[(head * 9 + i) * 6 + r] * row[r]).sum::<f64>();
                keys.extend((0..4).map(expand));
                keys.extend_from_slice(&row[6..]);
                values.extend((4..9).map(expand));
            }
        }
        let expanded = AttentionShape { num_heads: 3, num_kv_heads: 3, key_dim: 6, value_dim: 5, scale: 0.5 };
        let expected = attention(&expanded, &q, [&keys, &values], [18, 15]).unwrap();
        let got = latent_attention(&shape, &q, &cache, &kv_b).unwrap();
        assert!(expected.iter().zip(&got).all(|(a, b)| (a - b).abs() < 1e-12));
        assert_eq!(expected.len(), got.len());
    }
}
