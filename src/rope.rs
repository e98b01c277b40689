//! Rotary position embedding: what is rotated, by which angles.

use std::f64::consts::PI;

use crate::{Error, Result};

/// Which elements of a head form the pairs that are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum RopeLayout {
    /// Element `i` with `i + rotary_dim / 2` (`rotate_half`: LLaMA, Mixtral, Qwen, OLMoE, GLM, DeepSeekMoE V1).
    Half,
    /// Element `2i` with `2i + 1` (DeepSeek-V2 and V3).
    Interleaved,
}

/// How the frequencies are stretched beyond the context of pretraining.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by `factor` (position interpolation, arXiv 2306.15595).
    Linear {
        /// Context extension, at least 1.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, smooth in between.
    Llama3 {
        /// Context extension, at least 1.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pretraining.
        original_context: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Context extension, at least 1.
        factor: f64,
        /// Context length of pretraining.
        original_context: usize,
        /// Frequencies that turn more often than this within the original context are kept (usually 32).
        beta_fast: f64,
        /// Frequencies that turn less often than this are divided by `factor` (usually 1).
        beta_slow: f64,
        /// Whether the two bounds are rounded outwards to whole dimensions (usually true).
        truncate: bool,
        /// Multiplies cos and sin; see [`yarn_mscale`].
        attention_factor: f64,
    },
}

/// YaRN's attention temperature `0.1 a ln(s) + 1` for a context extension `s > 1`, else 1 (arXiv 2309.00071, eq. 22;
/// `a` is DeepSeek's `mscale`).
pub fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor > 1.0 { 0.1 * mscale * factor.ln() + 1.0 } else { 1.0 }
}

/// A rotary embedding (RoFormer, arXiv 2104.09864): pair `i` of position `p` turns by `p * theta^(-2i / rotary_dim)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    rotary_dim: usize,
    theta: f64,
    layout: RopeLayout,
    scaling: RopeScaling,
}

impl Rope {
    /// Describes the rotation of the first `rotary_dim` elements of every head; the rest pass unchanged.
    ///
    /// # Errors
    /// [`Error::Setting`] if `rotary_dim` is odd or zero, or `theta` or a scaling factor is out of range.
    pub fn new(rotary_dim: usize, theta: f64, layout: RopeLayout, scaling: RopeScaling) -> Result<Self> {
        let check = |setting: &'static str, holds: bool, expected: &str, got: &dyn std::fmt::Display| {
            if holds {
                return Ok(());
            }
            Err(Error::Setting { operation: "rope", setting, expected: expected.to_owned(), got: got.to_string() })
        };
        check("rotary_dim", rotary_dim > 0 && rotary_dim.is_multiple_of(2), "even and positive", &rotary_dim)?;
        check("theta", theta.is_finite() && theta > 1.0, "finite and above 1", &theta)?;
        let context = |length: usize| check("original context", length > 0, "at least 1", &length);
        let stretch = |factor: f64| {
            check("scaling factor", factor.is_finite() && factor >= 1.0, "finite and at least 1", &factor)
        };
        match scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => stretch(factor)?,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                stretch(factor)?;
                context(original_context)?;
                let ordered = low_freq_factor > 0.0 && high_freq_factor > low_freq_factor && high_freq_factor < 1e9;
                check("high_freq_factor", ordered, "above low_freq_factor, which is positive", &high_freq_factor)?;
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, .. } => {
                stretch(factor)?;
                context(original_context)?;
                let ordered = beta_slow > 0.0 && beta_fast >= beta_slow && beta_fast < 1e9;
                check("beta_fast", ordered, "at least beta_slow, which is positive", &beta_fast)?;
                let usable = attention_factor.is_finite() && attention_factor > 0.0;
                check("attention_factor", usable, "finite and positive", &attention_factor)?;
            }
        }
        Ok(Self { rotary_dim, theta, layout, scaling })
    }

    /// Elements of a head that are rotated.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }

    /// The base of the frequencies.
    pub fn theta(&self) -> f64 {
        self.theta
    }

    /// Which elements form pairs.
    pub fn layout(&self) -> RopeLayout {
        self.layout
    }

    /// How the frequencies are stretched.
    pub fn scaling(&self) -> RopeScaling {
        self.scaling
    }

    /// What cos and sin are multiplied with: 1 except under YaRN.
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Radians per position of each of the `rotary_dim / 2` pairs.
    ///
    /// Computed in float32, as Transformers does: at position 100,000 the rounding of a frequency is seen in the angle.
    pub fn frequencies(&self) -> Vec<f32> {
        let pairs = self.rotary_dim / 2;
        let base = |pair: usize| (self.theta as f32).powf((2 * pair) as f32 / self.rotary_dim as f32);
        (0..pairs)
            .map(|pair| {
                let plain = 1.0 / base(pair);
                match self.scaling {
                    RopeScaling::None => plain,
                    RopeScaling::Linear { factor } => plain / factor as f32,
                    RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                        let turns = original_context as f64 * f64::from(plain) / (2.0 * PI);
                        let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                        (f64::from(plain) * ((1.0 - keep) / factor + keep)) as f32
                    }
                    RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                        // The dimension whose frequency turns `turns` times within the original context.
                        let dim_of = |turns: f64| {
                            let length = original_context as f64;
                            self.rotary_dim as f64 * (length / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                        };
                        let (mut low, mut high) = (dim_of(beta_fast), dim_of(beta_slow));
                        if truncate {
                            (low, high) = (low.floor(), high.ceil());
                        }
                        (low, high) = (low.max(0.0), high.min(self.rotary_dim as f64 - 1.0));
                        if low == high {
                            high += 0.001;
                        }
                        let divide = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                        plain / factor as f32 * divide + plain * (1.0 - divide)
                    }
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// DeepSeek's published YaRN: of 32 frequencies, the first ten are kept and from the 23rd on all are divided by 40.
    #[test]
    fn yarn_ramp_of_deepseek() {
        let scaling = RopeScaling::Yarn {
            factor: 40.0,
            original_context: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.0,
        };
        let plain = Rope::new(64, 1e4, RopeLayout::Interleaved, RopeScaling::None).unwrap().frequencies();
        let yarn = Rope::new(64, 1e4, RopeLayout::Interleaved, scaling).unwrap().frequencies();
        let ratio = |i: usize| f64::from(plain[i] / yarn[i]);
        assert!((0..=10).all(|i| (ratio(i) - 1.0).abs() < 1e-6));
        assert!((11..23).all(|i| ratio(i) > 1.0 && ratio(i) < 40.0));
        assert!((23..32).all(|i| (ratio(i) - 40.0).abs() < 1e-4));
    }

    #[test]
    fn yarn_temperature_of_deepseek() {
        assert!((yarn_mscale(40.0, 0.707) - 1.260_804).abs() < 1e-6);
        assert!((yarn_mscale(40.0, 1.0) - 1.368_888).abs() < 1e-6);
        assert_eq!(yarn_mscale(1.0, 1.0), 1.0);
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(Rope::new(7, 1e4, RopeLayout::Half, RopeScaling::None).is_err());
        assert!(Rope::new(8, f64::NAN, RopeLayout::Half, RopeScaling::None).is_err());
        assert!(Rope::new(8, 1e4, RopeLayout::Half, RopeScaling::Linear { factor: 0.0 }).is_err());
    }
}
