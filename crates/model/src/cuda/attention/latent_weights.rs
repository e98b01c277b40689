//! Latent attention's sizes, and the forms in which a GPU holds the weights that make heads out of latents.

use half::bf16;

use super::{
    super::{
        load::{Axis, pad},
        memory::{Buffer, Gpu, Purpose},
    },
    mismatch,
};
use crate::{Config, Result, config::Attention, weights::StoredLinear};

/// Sizes of latent attention as the device has them.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct LatentSizes {
    pub(in crate::cuda) num_heads: usize,
    /// Of a projected query head, and of an expanded key.
    pub(in crate::cuda) head: usize,
    /// Its first rotated element.
    pub(super) nope: usize,
    pub(in crate::cuda) latent: usize,
    pub(super) rope: usize,
    pub(in crate::cuda) value: usize,
}

impl LatentSizes {
    pub(in crate::cuda) fn of(attention: &Attention) -> Option<Self> {
        let &Attention::Latent { num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } =
            attention
        else {
            return None;
        };
        Some(Self {
            num_heads,
            head: pad(qk_nope_head_dim + qk_rope_head_dim),
            nope: qk_nope_head_dim,
            latent: pad(kv_lora_rank),
            rope: pad(qk_rope_head_dim),
            value: pad(v_head_dim),
        })
    }

    /// Of a cached row, and a query that attends to it.
    pub(in crate::cuda) fn key(&self) -> usize {
        self.latent + self.rope
    }

    /// Of the keys of all heads.
    pub(super) fn keys(&self) -> usize {
        self.num_heads * self.head
    }

    /// Of the keys and values of all heads, which lie side by side.
    pub(super) fn heads(&self) -> usize {
        self.keys() + self.num_heads * self.value
    }
}

/// `W_UK` and `W_UV` of every head, from rows `head * (nope + v)` of the checkpoint's `kv_b`, `[.., latent]`.
pub(super) fn by_head(
    gpu: &Gpu,
    config: &Config,
    kv_b: &StoredLinear,
    sizes: &LatentSizes,
) -> Result<[Buffer<bf16>; 2]> {
    let &Attention::Latent { kv_lora_rank, qk_nope_head_dim: nope, qk_rope_head_dim, v_head_dim, .. } =
        &config.attention
    else {
        return Err(mismatch());
    };
    let (heads, key) = (sizes.num_heads, sizes.key());
    let mut absorb = gpu.zeros(Purpose::Weights, [heads, key, sizes.head])?;
    let mut expand = gpu.zeros(Purpose::Weights, [heads, sizes.value, sizes.latent])?;
    let (rows, per_head) = (kv_b.rows()?, nope + v_head_dim);
    let transposed = |values: &mut Vec<f32>, head: usize, out: &mut [bf16]| {
        out.fill(bf16::ZERO);
        for column in 0..nope {
            rows.read(head * per_head + column, values);
            values.iter().enumerate().for_each(|(row, value)| {
                out[row * sizes.head + column] = bf16::from_f32(*value);
            });
        }
        for element in 0..qk_rope_head_dim {
            out[(sizes.latent + element) * sizes.head + nope + element] = bf16::ONE;
        }
    };
    let pieces = [heads, key * sizes.head];
    gpu.staging().send(&gpu.stream, &mut absorb, 0, pieces, || vec![0.0; kv_lora_rank], transposed)?;
    for head in 0..heads {
        let (first, at) = (head * per_head + nope, head * sizes.value * sizes.latent);
        gpu.write(&mut expand, at, kv_b, Axis::part(first, v_head_dim), Axis::whole(kv_lora_rank))?;
    }
    Ok([absorb, expand])
}

/// `[H * head + H * v, key]`: what makes a cached row every head's key, then every head's value. Ones let the rotated elements pass to
/// each key. That is `kv_b` once more beside the absorbed form, 1.4 times as large and under one percent of a published model's weights: with it one plain product
/// writes complete keys and values.
pub(super) fn all_heads(gpu: &Gpu, config: &Config, kv_b: &StoredLinear, sizes: &LatentSizes) -> Result<Buffer<bf16>> {
    let &Attention::Latent { kv_lora_rank, qk_rope_head_dim, v_head_dim, .. } = &config.attention else {
        return Err(mismatch());
    };
    let (width, key) = (sizes.heads(), sizes.key());
    let mut weight = gpu.zeros(Purpose::Weights, [width, key])?;
    let rows = kv_b.rows()?;
    let fill = |values: &mut Vec<f32>, row: usize, out: &mut [bf16]| {
        out.fill(bf16::ZERO);
        match expanding_row(sizes, [qk_rope_head_dim, v_head_dim], row) {
            Row::Stored(stored) => {
                rows.read(stored, values);
                out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(*value));
            }
            Row::Passes(element) => out[sizes.latent + element] = bf16::ONE,
            Row::Padding => {}
        }
    };
    gpu.staging().send(&gpu.stream, &mut weight, 0, [width, key], || vec![0.0; kv_lora_rank], fill)?;
    Ok(weight)
}

/// A row of what expands latents.
#[derive(Debug, PartialEq, Eq)]
enum Row {
    /// This row of `kv_b`, whose heads are `[nope + v]`.
    Stored(usize),
    /// One at this rotated element.
    Passes(usize),
    Padding,
}

fn expanding_row(sizes: &LatentSizes, [rope, value]: [usize; 2], row: usize) -> Row {
    let per_head = sizes.nope + value;
    if let Some(row) = row.checked_sub(sizes.keys()) {
        let (head, element) = (row / sizes.value, row % sizes.value);
        return if element < value { Row::Stored(head * per_head + sizes.nope + element) } else { Row::Padding };
    }
    let (head, element) = (row / sizes.head, row % sizes.head);
    match element.checked_sub(sizes.nope) {
        None => Row::Stored(head * per_head + element),
        Some(element) if element < rope => Row::Passes(element),
        Some(_) => Row::Padding,
    }
}

#[cfg(test)]
mod tests {
    use super::{LatentSizes, Row, expanding_row};
    use crate::config::Attention;

    /// Two heads of 3 + 2 elements with values of 6: keys of 8 rows and values of 8.
    #[test]
    fn rows_that_expand_latents() {
        let attention = Attention::Latent {
            num_heads: 2,
            q_lora_rank: None,
            kv_lora_rank: 12,
            qk_nope_head_dim: 3,
            qk_rope_head_dim: 2,
            v_head_dim: 6,
            bias: false,
            inner_norm_eps: 1e-6,
        };
        let sizes = LatentSizes::of(&attention).unwrap();
        assert_eq!((sizes.key(), sizes.keys(), sizes.heads()), (24, 16, 32));
        let rows: Vec<Row> = (0..32).map(|row| expanding_row(&sizes, [2, 6], row)).collect();
        let head = |first| {
            let stored = (first..first + 3).map(Row::Stored);
            stored.chain([Row::Passes(0), Row::Passes(1), Row::Padding, Row::Padding, Row::Padding])
        };
        let values = |first| (first..first + 6).map(Row::Stored).chain([Row::Padding, Row::Padding]);
        let expected: Vec<Row> = head(0).chain(head(9)).chain(values(3)).chain(values(12)).collect();
        assert_eq!(rows, expected);
    }
}
