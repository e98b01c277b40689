//! Router logits: made from a seed, or read from a file.

use crate::failure::Failure;
use safetensors::{Dtype, SafeTensors};
use std::{fs, path::Path};

/// How tokens spread over experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Spread {
    /// Logits from a normal distribution: experts are about equally busy
    Normal,
    /// Experts are chosen in proportion to 1/rank
    Zipf,
    /// Every token goes to the same experts
    One,
}

impl Spread {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Zipf => "zipf",
            Self::One => "one",
        }
    }

    /// `[T, E]`. Element `i` hangs on the seed and `i` alone: `benches/peers.py` makes the same.
    pub(super) fn logits(self, seed: u64, tokens: usize, experts: usize) -> Vec<f32> {
        let value = |at: usize| {
            let expert = (at % experts) as f64;
            let [u, v] = uniforms(seed, at as u64);
            let logit = match self {
                // Box-Muller.
                Self::Normal => (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos(),
                // The largest of log p plus Gumbel noise are drawn in proportion to p, without replacement.
                Self::Zipf => -(-u.ln()).ln() - (expert + 1.0).ln(),
                Self::One => (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos() - 20.0 * expert,
            };
            logit as f32
        };
        (0..tokens * experts).map(value).collect()
    }
}

/// Two numbers in (0, 1) (splitmix64's halves).
fn uniforms(seed: u64, index: u64) -> [f64; 2] {
    let mut bits = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^= bits >> 31;
    [bits >> 32, bits & 0xffff_ffff].map(|half| (half as f64 + 0.5) / 4_294_967_296.0)
}

/// A safetensors file of logits, `SHAPE.T` `[T, E]` float32.
pub(super) struct LogitsFile {
    bytes: Vec<u8>,
    path: String,
}

impl LogitsFile {
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        let shown = path.display().to_string();
        let bytes = fs::read(path).map_err(|error| Failure::Failed(format!("cannot read {shown}: {error}")))?;
        let file = Self { bytes, path: shown };
        file.tensors()?;
        Ok(file)
    }

    fn tensors(&self) -> Result<SafeTensors<'_>, Failure> {
        SafeTensors::deserialize(&self.bytes)
            .map_err(|error| Failure::Failed(format!("{} is no safetensors file: {error}", self.path)))
    }

    /// The logits of a shape with T tokens; `None` if the file has none.
    pub(super) fn find(&self, shape: &str, tokens: usize, experts: usize) -> Result<Option<Vec<f32>>, Failure> {
        let (name, tensors) = (format!("{shape}.{tokens}"), self.tensors()?);
        let Ok(tensor) = tensors.tensor(&name) else { return Ok(None) };
        if tensor.dtype() != Dtype::F32 || tensor.shape() != [tokens, experts] {
            let (dtype, shape) = (tensor.dtype(), tensor.shape());
            return Err(Failure::Failed(format!(
                "{}: {name} must be F32 [{tokens}, {experts}], got {dtype} {shape:?}",
                self.path
            )));
        }
        let (values, _) = tensor.data().as_chunks();
        Ok(Some(values.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens per expert of the largest logits.
    fn counts(spread: Spread, tokens: usize, experts: usize) -> Vec<usize> {
        let mut counts = vec![0; experts];
        for row in spread.logits(1, tokens, experts).chunks_exact(experts) {
            let best = (0..experts).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
            counts[best] += 1;
        }
        counts
    }

    #[test]
    fn normal_logits_are_normal() {
        let logits = Spread::Normal.logits(5, 1000, 100);
        let mean = logits.iter().map(|logit| f64::from(*logit)).sum::<f64>() / 1e5;
        let variance = logits.iter().map(|logit| f64::from(*logit).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.016 && (variance - 1.0).abs() < 0.023, "{mean} {variance}");
        // benches/peers.py computes the same values.
        assert!((logits[0] + 0.8864).abs() < 1e-4 && (logits[1] + 0.6689).abs() < 1e-4, "{:?}", &logits[..2]);
    }

    #[test]
    fn zipf_falls_with_the_rank() {
        let counts = counts(Spread::Zipf, 20_000, 16);
        // 1 / (1 + 1/2 + ... + 1/16) = 0.2958 of the tokens choose the first expert, half as many the second.
        assert!((5600..6240).contains(&counts[0]), "{counts:?}");
        assert!((2750..3170).contains(&counts[1]), "{counts:?}");
        assert!((290..450).contains(&counts[15]), "{counts:?}");
    }

    #[test]
    fn one_is_the_same_for_all() {
        assert_eq!(counts(Spread::One, 300, 8), [300, 0, 0, 0, 0, 0, 0, 0]);
    }
}
