//! How the next token is drawn from the logits, as one validated value.

use crate::{Error, Result};

/// A rule for drawing the next token. Built with [`Sampling::builder`], validated once there; the operation itself is
/// [`reference::sample`](crate::reference::sample).
///
/// ```
/// use anabranch::Sampling;
/// let sampling = Sampling::builder().temperature(0.7).top_p(0.9).build()?;
/// assert_eq!(sampling.top_k(), None);
/// assert!(Sampling::builder().top_p(1.5).build().is_err());
/// assert!(Sampling::greedy().is_greedy());
/// # Ok::<(), anabranch::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    temperature: f32,
    top_k: Option<usize>,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
}

impl Sampling {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }

    /// Starts from the model's own distribution: temperature 1, no filter, no penalty.
    pub fn builder() -> SamplingBuilder {
        SamplingBuilder(Self { temperature: 1.0, ..Self::greedy() })
    }

    /// What the logits are divided by; 0 stands for the limit, which is greedy.
    pub fn temperature(&self) -> f32 {
        self.temperature
    }

    /// The number of most probable tokens to choose from, if limited.
    pub fn top_k(&self) -> Option<usize> {
        self.top_k
    }

    /// The probability mass to choose from; 1 for all of it.
    pub fn top_p(&self) -> f32 {
        self.top_p
    }

    /// The least probability, relative to the best token's; 0 for no limit.
    pub fn min_p(&self) -> f32 {
        self.min_p
    }

    /// What the logits of tokens already seen are weakened by; 1 for not at all.
    pub fn repetition_penalty(&self) -> f32 {
        self.repetition_penalty
    }

    /// Whether the most probable token is always chosen, so that no random number is needed.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

/// Builds a [`Sampling`].
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct SamplingBuilder(Sampling);

impl SamplingBuilder {
    /// Sets what the logits are divided by: below 1 sharpens the distribution, above 1 flattens it, 0 is greedy.
    pub fn temperature(mut self, temperature: f32) -> Self {
        self.0.temperature = temperature;
        self
    }

    /// Limits the choice to the `top_k` most probable tokens.
    pub fn top_k(mut self, top_k: usize) -> Self {
        self.0.top_k = Some(top_k);
        self
    }

    /// Limits the choice to the fewest tokens whose probabilities reach `top_p` (arXiv 1904.09751).
    pub fn top_p(mut self, top_p: f32) -> Self {
        self.0.top_p = top_p;
        self
    }

    /// Limits the choice to tokens at least `min_p` times as probable as the best (arXiv 2407.01082).
    pub fn min_p(mut self, min_p: f32) -> Self {
        self.0.min_p = min_p;
        self
    }

    /// Weakens (above 1) or strengthens (below 1) tokens already seen (arXiv 1909.05858).
    pub fn repetition_penalty(mut self, penalty: f32) -> Self {
        self.0.repetition_penalty = penalty;
        self
    }

    /// Validates the settings.
    ///
    /// # Errors
    /// [`Error::Setting`] unless the temperature is finite and at least 0, `top_k` at least 1, `top_p` in (0, 1],
    /// `min_p` in [0, 1) and the repetition penalty finite and above 0.
    pub fn build(self) -> Result<Sampling> {
        let Sampling { temperature, top_k, top_p, min_p, repetition_penalty } = self.0;
        let temperature_holds = temperature.is_finite() && temperature >= 0.0;
        check("temperature", temperature_holds, "finite and at least 0", &temperature)?;
        if let Some(top_k) = top_k {
            check("top_k", top_k >= 1, "at least 1", &top_k)?;
        }
        check("top_p", top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1", &top_p)?;
        check("min_p", (0.0..1.0).contains(&min_p), "at least 0 and below 1", &min_p)?;
        let penalty_holds = repetition_penalty.is_finite() && repetition_penalty > 0.0;
        check("repetition_penalty", penalty_holds, "finite and above 0", &repetition_penalty)?;
        Ok(self.0)
    }
}

fn check(setting: &'static str, holds: bool, expected: &str, got: &dyn std::fmt::Display) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Setting { operation: "sampling", setting, expected: expected.to_owned(), got: got.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_refused() {
        let builder = Sampling::builder;
        let refused = [
            builder().temperature(-0.1),
            builder().temperature(f32::NAN),
            builder().temperature(f32::INFINITY),
            builder().top_k(0),
            builder().top_p(0.0),
            builder().top_p(1.01),
            builder().top_p(f32::NAN),
            builder().min_p(-0.1),
            builder().min_p(1.0),
            builder().min_p(f32::NAN),
            builder().repetition_penalty(0.0),
            builder().repetition_penalty(f32::INFINITY),
            builder().repetition_penalty(f32::NAN),
        ];
        for sampling in refused {
            assert!(matches!(sampling.build(), Err(Error::Setting { .. })), "{sampling:?}");
        }
    }

    #[test]
    fn an_error_says_what_is_allowed() {
        let error = Sampling::builder().top_p(0.0).build().unwrap_err();
        assert_eq!(error.to_string(), "sampling: top_p must be above 0 and at most 1, got 0");
    }
}
