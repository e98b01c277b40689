//! What attention's property is tried on, and what the reference makes of it.

use anabranch::reference::{self, AttentionShape};
use half::bf16;
use proptest::prelude::*;

use crate::support::Noise;

/// One call of attention.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) shape: AttentionShape,
    /// Values are the first elements of keys.
    pub(crate) latent: bool,
    /// Tokens and keys of each sequence.
    pub(crate) lengths: Vec<(usize, usize)>,
    /// What the host's bounds are above the lengths.
    pub(crate) slack: [usize; 2],
    /// Rows of a block of the cache.
    pub(crate) block_size: usize,
    /// Elements of a cache row that belong to nobody.
    pub(crate) padding: usize,
    /// Multiplies the queries: large ones make the softmax sharp.
    pub(crate) gain: f32,
    pub(crate) seed: u64,
}

/// A case's values. What no sequence owns is NaN.
pub(crate) struct Data {
    pub(crate) q: Vec<bf16>,
    pub(crate) keys: Vec<bf16>,
    pub(crate) values: Vec<bf16>,
    pub(crate) strides: [usize; 2],
    pub(crate) rows: usize,
    pub(crate) q_offsets: Vec<u32>,
    pub(crate) kv_lengths: Vec<u32>,
    pub(crate) block_table: Vec<u32>,
    pub(crate) table_starts: Vec<u32>,
}

impl Case {
    pub(crate) fn tokens(&self) -> usize {
        self.lengths.iter().map(|(tokens, _)| tokens).sum()
    }

    pub(crate) fn bounds(&self) -> [usize; 2] {
        let most = |pick: fn(&(usize, usize)) -> usize| self.lengths.iter().map(pick).max().unwrap_or(0);
        [most(|lengths| lengths.0) + self.slack[0], most(|lengths| lengths.1) + self.slack[1]]
    }

    pub(crate) fn data(&self) -> Data {
        let AttentionShape { num_heads, num_kv_heads, key_dim, value_dim, .. } = self.shape;
        let mut noise = Noise(self.seed);
        let key_width = num_kv_heads * key_dim;
        let value_width = num_kv_heads * value_dim;
        let strides = if self.latent {
            [key_width.max(value_width) + self.padding; 2]
        } else {
            [key_width + self.padding, value_width + 2 * self.padding]
        };
        let q = (0..self.tokens() * num_heads * key_dim).map(|_| value(&mut noise, self.gain)).collect();

        // Blocks in no order, some of nobody; the last sequence's table comes first, and between tables is what is no block.
        let block_size = self.block_size;
        let owned: usize = self.lengths.iter().map(|(_, keys)| keys.div_ceil(block_size)).sum();
        let mut blocks: Vec<u32> = (0..owned as u32 + 2).collect();
        (1..blocks.len()).rev().for_each(|at| blocks.swap(at, (noise.bits() % (at as u64 + 1)) as usize));
        let rows = blocks.len() * block_size;
        let mut table_starts = vec![0; self.lengths.len()];
        let mut block_table = vec![u32::MAX; 2];
        for (start, (_, keys)) in table_starts.iter_mut().zip(&self.lengths).rev() {
            *start = block_table.len() as u32;
            block_table.extend(blocks.split_off(blocks.len() - keys.div_ceil(block_size)));
            block_table.push(u32::MAX);
        }
        let mut keys = vec![bf16::NAN; rows * strides[0]];
        let mut values = if self.latent { Vec::new() } else { vec![bf16::NAN; rows * strides[1]] };
        for (start, (_, length)) in table_starts.iter().zip(&self.lengths) {
            for position in 0..*length {
                let block = block_table[*start as usize + position / block_size] as usize;
                let row = block * block_size + position % block_size;
                let width = if self.latent { key_width.max(value_width) } else { key_width };
                keys[row * strides[0]..][..width].fill_with(|| value(&mut noise, 1.0));
                if !self.latent {
                    values[row * strides[1]..][..value_width].fill_with(|| value(&mut noise, 1.0));
                }
            }
        }
        let mut q_offsets = vec![0];
        for (tokens, _) in &self.lengths {
            q_offsets.push(q_offsets[q_offsets.len() - 1] + *tokens as u32);
        }
        let kv_lengths = self.lengths.iter().map(|(_, keys)| *keys as u32).collect();
        Data { q, keys, values, strides, rows, q_offsets, kv_lengths, block_table, table_starts }
    }

    /// The reference in float32 on the same bf16 values.
    pub(crate) fn expected(&self, data: &Data) -> Vec<f32> {
        let AttentionShape { num_heads, key_dim, value_dim, .. } = self.shape;
        let mut out = Vec::with_capacity(self.tokens() * num_heads * value_dim);
        for (sequence, (tokens, keys)) in self.lengths.iter().enumerate() {
            if *tokens == 0 {
                continue;
            }
            let width = num_heads * key_dim;
            let q = floats(&data.q[data.q_offsets[sequence] as usize * width..][..tokens * width]);
            let table = &data.block_table[data.table_starts[sequence] as usize..][..keys.div_ceil(self.block_size)];
            let cached = |cache: &[bf16], stride: usize| {
                floats(&reference::paged_rows(cache, [self.block_size, stride], table, *keys).unwrap())
            };
            let k = cached(&data.keys, data.strides[0]);
            let v = if self.latent { k.clone() } else { cached(&data.values, data.strides[1]) };
            out.extend(reference::attention(&self.shape, &q, [&k, &v], data.strides).unwrap());
        }
        out
    }
}

/// Of variance 1, rounded to bf16.
fn value(noise: &mut Noise, gain: f32) -> bf16 {
    bf16::from_f32((noise.uniform() - 0.5) * 12_f32.sqrt() * gain)
}

pub(crate) fn floats(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// The published head sizes, and any multiples of 8 below them.
fn any_heads() -> impl Strategy<Value = (AttentionShape, bool)> {
    let heads = prop::sample::select(vec![(1, 1), (4, 4), (4, 1), (6, 2), (7, 1), (16, 2), (32, 2), (24, 4)]);
    let dims = prop_oneof![
        6 => prop::sample::select(vec![(64, 64), (96, 96), (128, 128), (192, 128)]),
        2 => (1..=24_usize, 1..=16_usize).prop_map(|(key, value)| (8 * key, 8 * value)),
    ];
    let usual = (heads, dims).prop_map(|((num_heads, num_kv_heads), (key_dim, value_dim))| {
        (AttentionShape { num_heads, num_kv_heads, key_dim, value_dim, scale: 1.0 }, false)
    });
    let latent_dims = prop_oneof![
        3 => Just((576, 512)),
        1 => (1..=64_usize, 0..=8_usize).prop_map(|(value, more)| (8 * (value + more), 8 * value)),
    ];
    let heads = prop::sample::select(vec![1, 2, 16, 20, 40, 128]);
    let latent = (heads, latent_dims).prop_map(|(num_heads, (key_dim, value_dim))| {
        (AttentionShape { num_heads, num_kv_heads: 1, key_dim, value_dim, scale: 1.0 }, true)
    });
    prop_oneof![3 => usual, 1 => latent]
        .prop_map(|(shape, latent)| (AttentionShape { scale: (shape.key_dim as f32).powf(-0.5), ..shape }, latent))
}

/// Tokens and keys: nothing, a step of decoding, a few tokens, a piece of a prompt, a whole one.
fn any_lengths() -> impl Strategy<Value = (usize, usize)> {
    let keys = prop_oneof![1..=2000_usize, 1..=130_usize, Just(64), Just(65), Just(128), Just(2000)];
    (keys, 0..10_usize, any::<prop::sample::Index>()).prop_map(|(keys, kind, index)| {
        let tokens = match kind {
            0 => 0,
            1..=4 => 1,
            5 => 1 + index.index(5.min(keys)),
            6 | 7 => 1 + index.index(keys),
            _ => keys,
        };
        (tokens, keys)
    })
}

/// The reference's multiply-adds that a case may cost.
const MOST_WORK: usize = 2 << 30;

pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let decodes = prop::collection::vec((1..=2_usize, 2..=2000_usize), 1..=20);
    let lengths = prop_oneof![3 => prop::collection::vec(any_lengths(), 1..=6), 1 => decodes];
    let slack = (prop_oneof![Just(0), 0..=200_usize], prop_oneof![Just(0), 0..=5000_usize]);
    let gain = prop::sample::select(vec![1.0, 1.0, 4.0, 16.0]);
    let block_size = prop::sample::select(vec![64, 64, 128, 1024]);
    (any_heads(), lengths, slack, block_size, 0..=2_usize, gain, any::<u64>()).prop_map(
        |((shape, latent), mut lengths, slack, block_size, padding, gain, seed)| {
            let mut left = MOST_WORK;
            for (tokens, keys) in &mut lengths {
                let each = shape.num_heads * (shape.key_dim + shape.value_dim) * *keys;
                *tokens = (*tokens).min(left / each);
                left -= *tokens * each;
            }
            Case { shape, latent, lengths, slack: slack.into(), block_size, padding: 8 * padding, gain, seed }
        },
    )
}
