//! Weights on their way to the GPU: bf16, sizes padded with zeros to multiples of 8, some rows at a time.

use anabranch::{
    cuda::{Tensor, random_into},
    reference::random_from,
};
use half::bf16;
use rayon::prelude::*;

use super::memory::{Buffer, Gpu, Purpose};
use crate::{
    Result,
    weights::{Rows, Source, StoredLinear},
};

/// Elements that are converted at a time on the host: 16 MiB.
const STAGED: usize = 8 << 20;

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
        for block in 0..self.blocks {
            let from = self.start + block * self.size;
            out[block * self.padded..][..self.size].copy_from_slice(&values[from..from + self.size]);
        }
        out
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

    /// Converts `count` rows from `first` on, on all cores, and copies them.
    fn stage(
        &self,
        to: &mut Tensor<bf16>,
        at: usize,
        from: Rows<'_>,
        [first, count]: [usize; 2],
        columns: Axis,
        width: usize,
    ) -> Result<()> {
        let pitch = columns.len();
        let most = (STAGED / pitch.max(1)).clamp(1, count.max(1));
        let mut staged = vec![bf16::ZERO; most * pitch];
        for done in (0..count).step_by(most) {
            let rows = most.min(count - done);
            let staged = &mut staged[..rows * pitch];
            staged.par_chunks_exact_mut(pitch).enumerate().for_each_init(
                || vec![0.0; width],
                |values, (row, out)| {
                    from.read(first + done + row, values);
                    for (block, out) in out.chunks_exact_mut(columns.padded).enumerate() {
                        let values = &values[columns.start + block * columns.size..][..columns.size];
                        out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(*value));
                    }
                },
            );
            self.stream.upload_into(staged, &mut to.part_mut(at + done * pitch, [rows * pitch])?)?;
        }
        Ok(())
    }

    /// A weight by itself.
    pub(super) fn load(&self, from: &StoredLinear, rows: Axis, columns: Axis) -> Result<Buffer<bf16>> {
        let mut to = self.zeros(Purpose::Weights, [rows.len(), columns.len()])?;
        self.write(&mut to, 0, from, rows, columns)?;
        Ok(to)
    }
}

#[cfg(test)]
mod tests {
    use super::Axis;

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
}
