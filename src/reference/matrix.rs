//! Weights as they are stored.

use std::ops::Range;

use half::{bf16, f16};

use super::Real;
use crate::{Dtype, Error, Result, dtype::F8E4M3};

/// One float32 scale for each `block[0]` x `block[1]` block of an FP8 matrix (DeepSeek-V3's `weight_scale_inv`).
/// A weight is its code's value *times* the scale, despite that name.
#[derive(Debug, Clone, Copy)]
pub struct BlockScales<'a> {
    bytes: &'a [u8],
    block: [usize; 2],
}

/// A row-major `[rows, columns]` matrix of weights in its stored type: a view, so that a memory-mapped checkpoint is
/// never copied. The bytes are little-endian and need not be aligned.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    dtype: Dtype,
    rows: usize,
    columns: usize,
    bytes: &'a [u8],
    scales: Option<BlockScales<'a>>,
    /// Row of the scaled matrix that this view begins with.
    first_row: usize,
}

impl<'a> Matrix<'a> {
    /// Views `bytes` as a matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not `rows * columns` elements.
    pub fn new(dtype: Dtype, rows: usize, columns: usize, bytes: &'a [u8]) -> Result<Self> {
        let expected = rows.checked_mul(columns).and_then(|n| n.checked_mul(dtype.size()));
        if expected != Some(bytes.len()) {
            return Err(Error::Shape {
                operation: "matrix",
                argument: "bytes",
                expected: format!("{rows} x {columns} elements of {dtype}"),
                got: format!("{} bytes", bytes.len()),
            });
        }
        Ok(Self { dtype, rows, columns, bytes, scales: None, first_row: 0 })
    }

    /// Views float32 values as a matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not `rows * columns` values.
    pub fn from_f32(rows: usize, columns: usize, values: &'a [f32]) -> Result<Self> {
        Self::new(Dtype::F32, rows, columns, bytemuck::cast_slice(values))
    }

    /// Adds block scales: little-endian float32 `[ceil(rows / block[0]), ceil(columns / block[1])]`, ragged at the edges.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of scales does not fit, [`Error::Dtype`] if the matrix is not FP8.
    pub fn with_scales(mut self, bytes: &'a [u8], block: [usize; 2]) -> Result<Self> {
        if self.dtype != Dtype::F8E4m3 {
            return Err(Error::Dtype {
                operation: "matrix",
                argument: "block-scaled values",
                expected: "f8_e4m3",
                got: self.dtype,
            });
        }
        let count = |size: usize, block: usize| size.checked_div(block).map(|_| size.div_ceil(block));
        let expected = count(self.rows, block[0]).zip(count(self.columns, block[1])).map(|(r, c)| 4 * r * c);
        if expected != Some(bytes.len()) {
            return Err(Error::Shape {
                operation: "matrix",
                argument: "scales",
                expected: format!(
                    "one float32 for each {}x{} block of {}x{}",
                    block[0], block[1], self.rows, self.columns
                ),
                got: format!("{} bytes", bytes.len()),
            });
        }
        self.scales = Some(BlockScales { bytes, block });
        Ok(self)
    }

    /// Output features: rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features: columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The stored type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// A view of some of the rows.
    ///
    /// # Errors
    /// [`Error::Shape`] if the range is reversed or goes past the last row.
    pub fn slice_rows(&self, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > self.rows {
            return Err(Error::Shape {
                operation: "matrix",
                argument: "row range",
                expected: format!("within 0..{}", self.rows),
                got: format!("{}..{}", range.start, range.end),
            });
        }
        let pitch = self.columns * self.dtype.size();
        Ok(Self {
            rows: range.len(),
            bytes: &self.bytes[range.start * pitch..range.end * pitch],
            first_row: self.first_row + range.start,
            ..*self
        })
    }

    /// One row as it is stored, without its scales.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_bytes(&self, row: usize) -> &'a [u8] {
        let pitch = self.columns * self.dtype.size();
        &self.bytes[row * pitch..(row + 1) * pitch]
    }

    /// Writes one row's values, dequantised, to `out`, which is `columns` long.
    ///
    /// # Panics
    /// If there is no such row or `out` has another length.
    pub fn read_row<T: Real>(&self, row: usize, out: &mut [T]) {
        assert_eq!(out.len(), self.columns, "a row has as many values as the matrix has columns");
        let bytes = self.row_bytes(row);
        match self.dtype {
            Dtype::F32 => decode(bytes, out, |b: [u8; 4]| f32::from_le_bytes(b)),
            Dtype::F16 => decode(bytes, out, |b: [u8; 2]| f16::from_le_bytes(b).to_f32()),
            Dtype::Bf16 => decode(bytes, out, |b: [u8; 2]| bf16::from_le_bytes(b).to_f32()),
            Dtype::F8E4m3 => decode(bytes, out, |[b]: [u8; 1]| F8E4M3[usize::from(b)]),
        }
        if let Some(BlockScales { bytes, block }) = self.scales {
            let per_row = self.columns.div_ceil(block[1]);
            let scales = &bytes[(self.first_row + row) / block[0] * per_row * 4..][..per_row * 4];
            let (scales, _) = scales.as_chunks::<4>();
            for (values, scale) in out.chunks_mut(block[1]).zip(scales) {
                let scale = T::of(f32::from_le_bytes(*scale).into());
                values.iter_mut().for_each(|value| *value *= scale);
            }
        }
    }

    /// All values, dequantised, row by row.
    pub fn to_vec<T: Real>(&self) -> Vec<T> {
        let mut values = vec![T::ZERO; self.rows * self.columns];
        if self.columns > 0 {
            values.chunks_exact_mut(self.columns).enumerate().for_each(|(row, out)| self.read_row(row, out));
        }
        values
    }
}

fn decode<const N: usize, T: Real>(bytes: &[u8], out: &mut [T], value: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (out, element) in out.iter_mut().zip(elements) {
        *out = T::of(value(*element).into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_scales_reach_ragged_edges_and_slices() {
        // 3 x 5 ones in 2 x 3 blocks: 2 x 2 scales.
        let codes = [0x38u8; 15];
        let scales: Vec<u8> = [1.0f32, 2.0, 3.0, 4.0].iter().flat_map(|s| s.to_le_bytes()).collect();
        let matrix = Matrix::new(Dtype::F8E4m3, 3, 5, &codes).unwrap().with_scales(&scales, [2, 3]).unwrap();
        let expected = [1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 4.0, 4.0];
        assert_eq!(matrix.to_vec::<f32>(), expected);
        assert_eq!(matrix.slice_rows(1..3).unwrap().to_vec::<f32>(), expected[5..]);
        assert_eq!(matrix.slice_rows(1..3).unwrap().slice_rows(1..2).unwrap().to_vec::<f32>(), expected[10..]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        assert!(Matrix::new(Dtype::Bf16, 2, 3, &[0; 11]).is_err());
        assert!(Matrix::new(Dtype::F32, usize::MAX, 2, &[]).is_err());
        let codes = Matrix::new(Dtype::F8E4m3, 2, 2, &[0; 4]).unwrap();
        assert!(codes.with_scales(&[0; 8], [128, 128]).is_err());
        assert!(codes.with_scales(&[0; 4], [0, 128]).is_err());
        assert!(Matrix::from_f32(1, 1, &[0.0]).unwrap().with_scales(&[0; 4], [128, 128]).is_err());
        let (start, end) = (2, 1);
        assert!(codes.slice_rows(1..3).is_err() && codes.slice_rows(start..end).is_err());
    }

    #[test]
    fn every_type_reads_unaligned() {
        let mut bytes = vec![0u8];
        bytes.extend(bf16::from_f32(-1.5).to_le_bytes());
        assert_eq!(Matrix::new(Dtype::Bf16, 1, 1, &bytes[1..]).unwrap().to_vec::<f64>(), [-1.5]);
        bytes.truncate(1);
        bytes.extend(f16::from_f32(0.25).to_le_bytes());
        assert_eq!(Matrix::new(Dtype::F16, 1, 1, &bytes[1..]).unwrap().to_vec::<f32>(), [0.25]);
    }
}
