//! Shapes of named models, and values to compute with.

use std::{sync::LazyLock, time::Duration};

use anabranch::cuda::{Device, Stream, Tensor, embedding};
use criterion::{BenchmarkGroup, Criterion, measurement::WallTime};
use half::bf16;

/// Tokens of a call: decoding, small batches, prefill.
pub(crate) const TOKENS: [usize; 4] = [1, 64, 4096, 16_384];

/// A model's sizes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) hidden_size: usize,
    pub(crate) num_experts: usize,
    pub(crate) topk: usize,
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab_size: usize,
}

pub(crate) const MODELS: [Model; 3] = [
    Model {
        name: "qwen3-30b-a3b",
        hidden_size: 2048,
        num_experts: 128,
        topk: 8,
        num_heads: 32,
        num_kv_heads: 4,
        head_dim: 128,
        vocab_size: 151_936,
    },
    Model {
        name: "mixtral",
        hidden_size: 4096,
        num_experts: 8,
        topk: 2,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        vocab_size: 32_000,
    },
    Model {
        name: "glm-4.5",
        hidden_size: 5120,
        num_experts: 160,
        topk: 8,
        num_heads: 96,
        num_kv_heads: 8,
        head_dim: 128,
        vocab_size: 151_552,
    },
];

/// A stream on the first GPU; without one, says that the operation is left out.
pub(crate) fn stream(operation: &str) -> Option<Stream> {
    match Device::open(0) {
        Ok(device) => Some(device.new_stream().unwrap()),
        Err(error) => {
            eprintln!("{operation}: skipped: {error}");
            None
        }
    }
}

/// A group with the settings of all of them.
pub(crate) fn group<'a>(criterion: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = criterion.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500)).sample_size(20);
    group
}

/// Reproducible bits (xorshift).
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new() -> Self {
        Self(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    /// In (0, 1).
    pub(crate) fn uniform(&mut self) -> f32 {
        ((self.bits() & 0xff_ffff) as f32 + 0.5) / (1_u64 << 24) as f32
    }

    /// Standard normal (Box-Muller).
    pub(crate) fn normal(&mut self) -> f32 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f32::consts::TAU * self.uniform()).cos()
    }
}

/// A matrix of normal values: rows drawn from a few hundred random ones, on the GPU, because some matrices have gigabytes.
pub(crate) fn rows(stream: &Stream, rows: usize, width: usize) -> Tensor<bf16> {
    const DISTINCT: usize = 256;
    // A prime number of values, so that no two rows are the same.
    static VALUES: LazyLock<Vec<bf16>> = LazyLock::new(|| {
        let mut noise = Noise::new();
        (0..65_537).map(|_| bf16::from_f32(noise.normal())).collect()
    });
    let distinct = rows.min(DISTINCT);
    let values: Vec<bf16> = VALUES.iter().cycle().take(distinct * width).copied().collect();
    let mut noise = Noise::new();
    let ids: Vec<u32> = (0..rows).map(|_| (noise.bits() % distinct as u64) as u32).collect();
    let table = stream.upload([distinct, width], &values).unwrap();
    embedding(stream, &table.view(), &stream.upload([rows], &ids).unwrap().view()).unwrap()
}

/// `[T, K]` experts, evenly drawn, no two of a token the same.
pub(crate) fn topk_ids(tokens: usize, model: &Model) -> Vec<i32> {
    let mut noise = Noise::new();
    let mut ids = Vec::with_capacity(tokens * model.topk);
    for token in 0..tokens {
        while ids.len() < (token + 1) * model.topk {
            let id = (noise.bits() % model.num_experts as u64) as i32;
            if !ids[token * model.topk..].contains(&id) {
                ids.push(id);
            }
        }
    }
    ids
}
