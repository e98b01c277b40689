//! The values of a random checkpoint.
//!
//! | tensor | value, N standard normal |
//! |---|---|
//! | norm weight | 1 + 0.1 N |
//! | bias of a projection | 0.02 N |
//! | selection bias | -0.75 + 0.0137 N: negative, and finer than bf16 can hold |
//! | gate of a router | 2.4 N / sqrt(in): logits far from uniform |
//! | any other matrix | 0.64 N / sqrt(in): outputs of every width stay below their inputs, so deep models do not overflow |
//! | block scale | 0.64 / sqrt(in) * 6 / 448 * U, U uniform in 0.5..1.5; the FP8 codes are of N * 448 / 6 |
//!
//! At width 64 these are the values of the golden checkpoints in `tests/golden`.

use anabranch::Dtype;
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;

use crate::{
    Result,
    tensors::{Part, TensorKind, TensorSpec},
};

/// Elements that one stream of the generator fills: part of what a seed means, so not to be tuned.
const CHUNK: usize = 1 << 16;
/// Chunks that are filled at once, on all cores, before they are written: 16 MiB of float32.
const CHUNKS: usize = 64;
/// Normal values beyond this are cut off in FP8 (one in 500 million).
const FP8_SIGMAS: f32 = 6.0;
const FP8_MAX: f32 = 448.0;
/// How what a tensor holds is distributed.
#[derive(Clone, Copy)]
pub(crate) struct Values {
    pub(crate) mean: f32,
    /// The standard deviation; for uniform values half the width.
    pub(crate) spread: f32,
    uniform: bool,
}

impl Values {
    /// The seed of one tensor.
    pub(crate) fn seed(seed: u64, name: &str) -> u64 {
        seed ^ name_hash(name)
    }

    pub(crate) fn of(spec: &TensorSpec) -> Self {
        let normal = |mean, spread| Self { mean, spread, uniform: false };
        let matrix = |gain: f32, columns: usize| gain / (columns.max(1) as f32).sqrt();
        let columns = spec.shape.last().copied().unwrap_or(1);
        match (spec.kind, spec.part, spec.dtype) {
            (TensorKind::Norm, ..) => normal(1.0, 0.1),
            (TensorKind::Bias, ..) => normal(0.0, 0.02),
            (TensorKind::SelectionBias, ..) => normal(-0.75, 0.0137),
            (TensorKind::Scale, ..) => {
                // A scale's columns are those of its weight over the block's; 128 is the block of every published model,
                // and another would only make the weights somewhat smaller or larger.
                let mean = matrix(0.64, columns * 128) * FP8_SIGMAS / FP8_MAX;
                Self { mean, spread: mean / 2.0, uniform: true }
            }
            (_, _, Dtype::F8E4m3) => normal(0.0, FP8_MAX / FP8_SIGMAS),
            (_, Part::Router, _) => normal(0.0, matrix(2.4, columns)),
            _ => normal(0.0, matrix(0.64, columns)),
        }
    }
}

/// Produces a tensor's bytes, little-endian, in order and in pieces of at most 16 MiB.
pub(super) fn fill(spec: &TensorSpec, seed: u64, mut write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let values = Values::of(spec);
    let size = spec.dtype.size();
    let elements: usize = spec.shape.iter().product();
    let mut buffer = vec![0; elements.min(CHUNK * CHUNKS) * size];
    for start in (0..elements).step_by(CHUNK * CHUNKS) {
        let bytes = &mut buffer[..(elements - start).min(CHUNK * CHUNKS) * size];
        bytes.par_chunks_mut(CHUNK * size).enumerate().for_each(|(chunk, bytes)| {
            let mut random = ChaCha8Rng::seed_from_u64(Values::seed(seed, &spec.name));
            random.set_stream((start / CHUNK + chunk) as u64);
            fill_chunk(bytes, spec.dtype, values, &mut random);
        });
        write(bytes)?;
    }
    Ok(())
}

fn fill_chunk(bytes: &mut [u8], dtype: Dtype, values: Values, random: &mut ChaCha8Rng) {
    let mut next = || {
        let value: f32 = if values.uniform { random.random_range(-1.0..1.0) } else { random.sample(StandardNormal) };
        values.mean + values.spread * value
    };
    match dtype {
        Dtype::F16 => bytes.as_chunks_mut().0.iter_mut().for_each(|to| *to = f16::from_f32(next()).to_le_bytes()),
        Dtype::Bf16 => bytes.as_chunks_mut().0.iter_mut().for_each(|to| *to = bf16::from_f32(next()).to_le_bytes()),
        Dtype::F8E4m3 => bytes.iter_mut().for_each(|to| *to = f8e4m3(next())),
        _ => bytes.as_chunks_mut().0.iter_mut().for_each(|to| *to = next().to_le_bytes()),
    }
}

/// FNV-1a: the standard library's hash may differ between versions, and the same seed should not.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The E4M3FN code nearest to a finite value, ties to even, saturating at 448.
fn f8e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(FP8_MAX);
    // The spacing of codes is 2^-9 below 2^-6 and an eighth of the power of two above.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude * 2f32.powi(3 - exponent)).round_ties_even() as i32;
    // Eight steps begin a normal binade; sixteen, after rounding up, are the next one's first code.
    sign | (((exponent + 6) << 3) + steps) as u8
}

#[cfg(test)]
mod tests {
    use super::{f8e4m3, name_hash};
    use anabranch::f8e4m3_to_f32;

    #[test]
    fn fp8_codes_are_the_nearest() {
        for code in (0..=0x7e_u8).flat_map(|code| [code, code | 0x80]) {
            let value = f8e4m3_to_f32(code);
            assert_eq!(f8e4m3(value), code);
            if code & 0x7f != 0x7e {
                let next = f8e4m3_to_f32(code + 1);
                let middle = f32::midpoint(value, next);
                assert_eq!(f8e4m3(middle), code + (code & 1), "ties to even: {middle}");
                assert_eq!(f8e4m3(middle + (value - middle) * 0.01), code);
                assert_eq!(f8e4m3(middle + (next - middle) * 0.01), code + 1);
            }
        }
        assert_eq!((f8e4m3(1e9), f8e4m3(-1e9)), (0x7e, 0xfe));
    }

    #[test]
    fn name_hash_is_fnv1a() {
        assert_eq!(name_hash(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(name_hash("a"), 0xaf63_dc4c_8601_ec8c);
    }
}
