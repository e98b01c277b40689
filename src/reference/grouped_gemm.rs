//! Experts, each applied to its own segment of the permuted rows.

use rayon::prelude::*;

use super::{Linear, Matrix, Permutation, Real, linear};
use crate::{Error, Result, error::check_len};

/// The nonlinearity of a non-gated expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activation {
    /// `max(x, 0)` (Switch, GShard).
    Relu,
    /// The exact GELU, `x * (1 + erf(x / sqrt(2))) / 2` (arXiv 1606.08415).
    Gelu,
}

/// The weights of one feed-forward network: an expert, the shared experts, or a dense layer.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Expert<'a> {
    /// `down(silu(gate(x)) * up(x))` with `silu(x) = x * sigmoid(x)` (GLU variants, arXiv 2002.05202).
    SwiGlu {
        /// `[n, d]`.
        gate: Linear<'a>,
        /// `[n, d]`.
        up: Linear<'a>,
        /// `[d, n]`.
        down: Linear<'a>,
    },
    /// `down(activation(up(x)))`.
    Plain {
        /// Between the two products.
        activation: Activation,
        /// `[n, d]`.
        up: Linear<'a>,
        /// `[d, n]`.
        down: Linear<'a>,
    },
}

impl<'a> Expert<'a> {
    /// An expert as Transformers holds it in memory: `gate_up` `[2n, d]`, gate rows first, and `down` `[d, n]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of rows is odd.
    pub fn swiglu_stacked(gate_up: Matrix<'a>, down: Matrix<'a>) -> Result<Self> {
        let n = gate_up.rows() / 2;
        check_len("expert", "gate_up rows", gate_up.rows(), 2 * n)?;
        Ok(Self::SwiGlu {
            gate: gate_up.slice_rows(0..n)?.into(),
            up: gate_up.slice_rows(n..2 * n)?.into(),
            down: down.into(),
        })
    }

    /// Input and output width, d.
    pub fn hidden_size(&self) -> usize {
        match self {
            Self::SwiGlu { down, .. } | Self::Plain { down, .. } => down.weight.rows(),
        }
    }
}

/// One expert on `x` `[rows, d]`, in parallel over tiles of its weights.
///
/// # Errors
/// [`Error::Shape`] if the weights do not fit each other or `x`.
pub fn expert_forward<T: Real>(x: &[T], rows: usize, expert: &Expert<'_>) -> Result<Vec<T>> {
    match expert {
        Expert::SwiGlu { gate, up, down } => {
            let mut h = linear(x, rows, gate)?;
            let up = linear(x, rows, up)?;
            check_len("expert", "gate and up rows", h.len(), up.len())?;
            h.par_iter_mut().zip(up).with_min_len(4096).for_each(|(gate, up)| {
                *gate = *gate / (T::ONE + (-*gate).exp()) * up;
            });
            linear(&h, rows, down)
        }
        Expert::Plain { activation, up, down } => {
            let mut h = linear(x, rows, up)?;
            for value in &mut h {
                *value = match activation {
                    // Written so that NaN stays NaN.
                    Activation::Relu => {
                        if *value < T::ZERO {
                            T::ZERO
                        } else {
                            *value
                        }
                    }
                    Activation::Gelu => T::of(0.5) * *value * (T::ONE + erf(*value / T::of(2.0).sqrt())),
                };
            }
            linear(&h, rows, down)
        }
    }
}

/// Every expert on its rows of `x` `[T, d]`: `[rows, d]` in permuted order, in parallel over experts.
///
/// # Errors
/// [`Error::Shape`] if there are not as many experts as the permutation has, or their weights do not fit `x`.
pub fn grouped_gemm<T: Real>(
    x: &[T],
    hidden_size: usize,
    experts: &[Expert<'_>],
    permutation: &Permutation,
) -> Result<Vec<T>> {
    check_len("grouped_gemm", "experts", experts.len(), permutation.expert_offsets().len() - 1)?;
    if let Some(expert) = experts.iter().find(|expert| expert.hidden_size() != hidden_size) {
        return Err(Error::Shape {
            operation: "grouped_gemm",
            argument: "down projection",
            expected: format!("{hidden_size} rows"),
            got: expert.hidden_size().to_string(),
        });
    }
    let rows = permutation.permute(x, hidden_size)?;
    let mut y = vec![T::ZERO; rows.len()];
    let mut segments = Vec::with_capacity(experts.len());
    let mut rest = y.as_mut_slice();
    for (expert, range) in experts.iter().zip(permutation.expert_offsets().windows(2)) {
        let (segment, after) = rest.split_at_mut((range[1] - range[0]) * hidden_size);
        rest = after;
        if !segment.is_empty() {
            segments.push((expert, &rows[range[0] * hidden_size..range[1] * hidden_size], segment));
        }
    }
    segments.into_par_iter().try_for_each(|(expert, x, y)| {
        y.copy_from_slice(&expert_forward(x, x.len() / hidden_size, expert)?);
        Ok(())
    })?;
    Ok(y)
}

/// The error function, to a relative error near 1e-16: its Maclaurin series for small arguments, the continued
/// fraction of erfc (Abramowitz and Stegun 7.1.6, 7.1.14) for large ones.
fn erf<T: Real>(x: T) -> T {
    let x = x.to_f64();
    let z = x.abs();
    let series = || {
        let (mut term, mut sum, mut n) = (z, z, 0.0);
        while term > sum * 1e-17 {
            n += 1.0;
            term *= 2.0 * z * z / (2.0 * n + 1.0);
            sum += term;
        }
        sum * (-z * z).exp() * std::f64::consts::FRAC_2_SQRT_PI
    };
    let fraction = || {
        let tail = (1..=60).rev().fold(z, |tail, n| z + 0.5 * f64::from(n) / tail);
        1.0 - (-z * z).exp() / (tail * std::f64::consts::PI.sqrt())
    };
    let value = if z < 2.5 { series() } else { fraction() };
    T::of(if x.is_nan() { x } else { value.copysign(x) })
}

#[cfg(test)]
mod tests {
    use super::erf;

    /// Values from Abramowitz and Stegun, table 7.1.
    #[test]
    fn erf_table() {
        for (x, expected) in [
            (0.0, 0.0),
            (0.1, 0.112_462_916_018_284_9),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (2.6, 0.999_763_965_583_470_7),
            (4.0, 0.999_999_984_582_742_1),
        ] {
            assert!((erf::<f64>(x) - expected).abs() < 1e-14, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
        assert_eq!(erf(f64::INFINITY), 1.0);
        assert!(erf(f64::NAN).is_nan());
    }
}
