//! Products of activations with weights: `y = x W^T + b`.

use rayon::prelude::*;

use super::{Matrix, Real};
use crate::{Result, error::check_len};

/// A weight `[out, in]` with an optional bias `[out]`.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// The weight.
    pub weight: Matrix<'a>,
    /// Added to every row of the product.
    pub bias: Option<&'a [f32]>,
}

impl<'a> From<Matrix<'a>> for Linear<'a> {
    fn from(weight: Matrix<'a>) -> Self {
        Self { weight, bias: None }
    }
}

/// Elements of the weight that are dequantised at a time: they stay in a core's L2 cache until multiplied.
const TILE: usize = 64 * 1024;

/// `y[T, out] = x[T, in] W^T + b`, accumulated in `T`. The weight is dequantised tile by tile, in parallel over tiles.
///
/// # Errors
/// [`crate::Error::Shape`] if `x` is not `num_tokens` rows of the weight's columns or the bias does not fit.
pub fn linear<T: Real>(x: &[T], num_tokens: usize, layer: &Linear<'_>) -> Result<Vec<T>> {
    let Linear { weight, bias } = layer;
    let (out, inner) = (weight.rows(), weight.columns());
    check_len("linear", "x", x.len(), num_tokens * inner)?;
    if let Some(bias) = bias {
        check_len("linear", "bias", bias.len(), out)?;
    }
    if num_tokens == 0 || out == 0 {
        return Ok(Vec::new());
    }
    let tile_rows = (TILE / inner.max(1)).clamp(1, out);
    // Transposed, so that each tile owns a contiguous piece of the result.
    let mut transposed = vec![T::ZERO; out * num_tokens];
    transposed.par_chunks_mut(tile_rows * num_tokens).enumerate().for_each_init(
        || vec![T::ZERO; tile_rows * inner],
        |tile, (index, result)| {
            let first = index * tile_rows;
            let rows = result.len() / num_tokens;
            for row in 0..rows {
                weight.read_row(first + row, &mut tile[row * inner..(row + 1) * inner]);
            }
            let tile = View { data: &tile[..rows * inner], stride: [inner, 1] };
            matmul([rows, num_tokens, inner], tile, View { data: x, stride: [1, inner] }, result);
        },
    );
    let mut y = if num_tokens == 1 { transposed } else { transpose(&transposed, out, num_tokens) };
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(out) {
            row.iter_mut().zip(*bias).for_each(|(value, bias)| *value += T::of((*bias).into()));
        }
    }
    Ok(y)
}

fn transpose<T: Real>(from: &[T], rows: usize, columns: usize) -> Vec<T> {
    let mut to = vec![T::ZERO; from.len()];
    to.par_chunks_exact_mut(rows).enumerate().for_each(|(column, out)| {
        out.iter_mut().enumerate().for_each(|(row, out)| *out = from[row * columns + column]);
    });
    to
}

/// A strided matrix operand of [`matmul`]: element `(i, j)` is `data[i * stride[0] + j * stride[1]]`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    /// The elements.
    pub data: &'a [T],
    /// Distance between rows, distance between columns.
    pub stride: [usize; 2],
}

/// `out[m, n] = a[m, k] b[k, n]` on one thread; `out` is row-major and overwritten.
///
/// # Panics
/// If an operand or `out` is shorter than the shape needs.
pub fn matmul<T: Real>([m, n, k]: [usize; 3], a: View<'_, T>, b: View<'_, T>, out: &mut [T]) {
    assert_eq!(out.len(), m * n, "the product of [{m}, {k}] and [{k}, {n}] has {m} x {n} elements");
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        out.fill(T::ZERO);
        return;
    }
    let last = |rows: usize, columns: usize, [row, column]: [usize; 2]| (rows - 1) * row + (columns - 1) * column;
    assert!(last(m, k, a.stride) < a.data.len(), "a holds [{m}, {k}]");
    assert!(last(k, n, b.stride) < b.data.len(), "b holds [{k}, {n}]");
    // SAFETY: the asserts above keep every element that gemm addresses inside `out`, `a` and `b`; `out` is borrowed
    // mutably and so overlaps neither; with `read_dst` false its old values are not read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.data.as_ptr(),
            a.stride[1] as isize,
            a.stride[0] as isize,
            b.data.as_ptr(),
            b.stride[1] as isize,
            b.stride[0] as isize,
            T::ZERO,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the sum written out, with tiles that do not divide the rows.
    #[test]
    fn product_is_the_sum() {
        let (tokens, out, inner) = (3, 37, 4001);
        let x: Vec<f64> = (0..tokens * inner).map(|i| ((i * 7919 % 1013) as f64 - 500.0) / 500.0).collect();
        let w: Vec<f32> = (0..out * inner).map(|i| ((i * 104_729 % 997) as f32 - 498.0) / 498.0).collect();
        let bias: Vec<f32> = (0..out).map(|i| i as f32).collect();
        let weight = Matrix::from_f32(out, inner, &w).unwrap();
        let y = linear(&x, tokens, &Linear { weight, bias: Some(&bias) }).unwrap();
        for t in 0..tokens {
            for o in 0..out {
                let dot: f64 = (0..inner).map(|i| x[t * inner + i] * f64::from(w[o * inner + i])).sum();
                assert!((y[t * out + o] - dot - o as f64).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn empty_operands() {
        let weight = Matrix::from_f32(2, 0, &[]).unwrap();
        assert_eq!(linear::<f32>(&[], 2, &weight.into()).unwrap(), [0.0; 4]);
        assert_eq!(linear::<f32>(&[], 0, &Matrix::from_f32(2, 1, &[1.0, 2.0]).unwrap().into()).unwrap(), []);
        assert!(linear::<f32>(&[1.0], 2, &Matrix::from_f32(2, 1, &[1.0, 2.0]).unwrap().into()).is_err());
    }
}
