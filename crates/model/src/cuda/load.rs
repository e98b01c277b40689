//! Weights on their way to the GPU: bf16, sizes padded with zeros to multiples of 8, some rows at a time.

use anabranch::{
    cuda::{Tensor, random_into},
    reference::random_from,
};
use half::bf16;

use super::memory::{Buffer, Gpu, Purpose};
use crate::{
    Result,
    weights::{Rows, Source, StoredLinear},
};

/// What the kernels take: multiples of 16 bytes.
pub(super) fn pad(size: usize) -> usize {
    size.next_multiple_of(8)
}

/// A dimension of a weight, or part of it: `blocks` blocks of `size`, from index `start` on, each padded to `padded`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Axis {
    start: usize,
    blocks: usize,
    size: usize,
    padded: usize,
}

impl Axis {
    /// All of a dimension, padded at its end.
    pub(super) fn whole(size: usize) -> Self {
        Self::part(0, size)
    }

    /// `size` indices from `start` on, padded at their end.
    pub(super) fn part(start: usize, size: usize) -> Self {
        Self { start, blocks: 1, size, padded: pad(size) }
    }

    /// As it is: rows that nothing is multiplied with.
    pub(super) fn exact(size: usize) -> Self {
        Self { start: 0, blocks: 1, size, padded: size }
    }

    /// Heads, each padded at its end.
    pub(super) fn heads(heads: usize, size: usize) -> Self {
        Self { start: 0, blocks: heads, size, padded: pad(size) }
    }

    /// Length on the device.
    pub(super) fn len(&self) -> usize {
        self.blocks * self.padded
    }

    /// Length in the checkpoint.
    pub(super) fn stored(&self) -> usize {
        self.blocks * self.size
    }

    fn is_padded(&self) -> bool {
        self.size != self.padded
    }

    /// Values along the axis with the padding between them.
    pub(super) fn spread(&self, values: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.lay(&mut out, |from, out| out.copy_from_slice(&values[from..from + out.len()]));
        out
    }

    /// Writes all of `out`: `copy` a block from where it begins in the checkpoint, zeros what pads it.
    fn lay<T: Default>(&self, out: &mut [T], copy: impl Fn(usize, &mut [T])) {
        for (block, out) in out.chunks_exact_mut(self.padded).enumerate() {
            let (out, padding) = out.split_at_mut(self.size);
            copy(self.start + block * self.size, out);
            padding.fill_with(T::default);
        }
    }
}

impl Gpu {
    /// Writes rows and columns of a weight to `to`, row-major, from element `at` on. What is padding there must be zeros already.
    pub(super) fn write(
        &self,
        to: &mut Tensor<bf16>,
        at: usize,
        from: &StoredLinear,
        rows: Axis,
        columns: Axis,
    ) -> Result<()> {
        let [_, width] = from.shape()?;
        let pitch = columns.len();
        let whole_rows = !columns.is_padded() && columns.start == 0 && columns.stored() == width;
        // Blocks without padding between them are one.
        let blocks = if rows.is_padded() { rows.blocks } else { 1 };
        let block_rows = rows.stored() / blocks;
        for block in 0..blocks {
            let (first, at) = (rows.start + block * block_rows, at + block * rows.padded * pitch);
            match from.weight {
                Source::Random { seed, scale, .. } if whole_rows => {
                    let seed = random_from(seed, (first * width) as u64);
                    random_into(&self.stream, seed, scale, &mut to.part_mut(at, [block_rows * pitch])?)?;
                }
                _ => self.stage(to, at, from.rows()?, [first, block_rows], columns, width)?,
            }
        }
        Ok(())
    }

    /// Copies `count` rows from `first` on.
    fn stage(
        &self,
        to: &mut Tensor<bf16>,
        at: usize,
        from: Rows<'_>,
        [first, count]: [usize; 2],
        columns: Axis,
        width: usize,
    ) -> Result<()> {
        let row = |values: &mut Vec<f32>, row, out: &mut [bf16]| lay(from, first + row, columns, values, out);
        self.staging().send(&self.stream, to, at, [count, columns.len()], || vec![0.0; width], row)
    }

    /// A weight by itself.
    pub(super) fn load(&self, from: &StoredLinear, rows: Axis, columns: Axis) -> Result<Buffer<bf16>> {
        let mut to = self.zeros(Purpose::Weights, [rows.len(), columns.len()])?;
        self.write(&mut to, 0, from, rows, columns)?;
        Ok(to)
    }
}

/// Lays a row out as the device has it: bf16, zeros for padding. `values` has room for a row in float32.
fn lay(from: Rows<'_>, row: usize, columns: Axis, values: &mut [f32], out: &mut [bf16]) {
    if let Some(stored) = from.bf16(row) {
        columns.lay(out, |from, out| {
            let out: &mut [u8] = bytemuck::cast_slice_mut(out);
            out.copy_from_slice(&stored[2 * from..][..out.len()]);
        });
    } else {
        from.read(row, values);
        columns.lay(out, |from, out| {
            out.iter_mut().zip(&values[from..]).for_each(|(out, value)| *out = bf16::from_f32(*value));
        });
    }
}

#[cfg(test)]
mod tests {
    use anabranch::{Dtype, reference::Matrix};
    use half::{bf16, f16};

    use super::{Axis, lay};
    use crate::weights::Rows;

    #[test]
    fn axes_count_and_spread() {
        assert_eq!((Axis::whole(16).len(), Axis::whole(20).len(), Axis::exact(3).len()), (16, 24, 3));
        let heads = Axis::heads(2, 3);
        assert_eq!((heads.len(), heads.stored()), (16, 6));
        let spread = heads.spread(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(spread[..4], [1.0, 2.0, 3.0, 0.0]);
        assert_eq!(spread[8..12], [4.0, 5.0, 6.0, 0.0]);
        assert_eq!(Axis::part(1, 2).spread(&[1.0, 2.0, 3.0])[..3], [2.0, 3.0, 0.0]);
    }

    /// Whatever a row is stored in, the buffer that it goes to held something else.
    #[test]
    fn rows_are_laid_out_whole() {
        // Exact in every type, but for what bf16 rounds: 1 + 3 / 256 is a tie, to the even 1 + 4 / 256.
        let values = [1.0 + 3.0 / 256.0, -2.0, 0.5, 3.0, -0.0, 1.5, 100.0, f32::INFINITY];
        let expected = values.map(bf16::from_f32);
        assert_eq!(expected[0].to_f32(), 1.0 + 4.0 / 256.0);
        // Each after two rows of something else.
        let stored = |row: Vec<u8>| [vec![0xaa; 2 * row.len()], row].concat();
        let types = [
            (Dtype::F32, stored(values.iter().flat_map(|value| value.to_le_bytes()).collect())),
            (Dtype::F16, stored(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect())),
            (Dtype::Bf16, stored(expected.iter().flat_map(|value| value.to_le_bytes()).collect())),
        ];
        for (dtype, bytes) in &types {
            let rows = Rows::Stored(Matrix::new(*dtype, 3, 8, bytes).unwrap());
            for columns in [Axis::whole(8), Axis::part(1, 5), Axis::heads(2, 4), Axis::heads(4, 2), Axis::exact(3)] {
                let mut out = vec![bf16::NAN; columns.len()];
                lay(rows, 2, columns, &mut [0.0; 8], &mut out);
                for (index, value) in out.iter().enumerate() {
                    let (block, column) = (index / columns.padded, index % columns.padded);
                    let stored = expected.get(columns.start + block * columns.size + column);
                    let wanted = if column < columns.size { *stored.unwrap() } else { bf16::ZERO };
                    assert_eq!(value.to_bits(), wanted.to_bits(), "{dtype}, {columns:?}, element {index}");
                }
            }
        }
    }
}
