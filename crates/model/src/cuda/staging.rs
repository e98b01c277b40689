//! Weights between the checkpoint's map and the GPU: a ring of page-locked buffers. While the GPU fetches what is in some, all cores fill
//! the next, so that no weight lies in host memory but in the map and, for a moment, here.

use std::collections::VecDeque;

use anabranch::cuda::{Pinned, Stream, Tensor};
use half::bf16;
use rayon::prelude::*;

use crate::Result;

/// Elements of a buffer: 16 MiB, which the bus takes a third of a millisecond for.
const LEN: usize = 8 << 20;
/// More than two, so that a core that is late does not make the bus wait.
const BUFFERS: usize = 4;

/// The buffers, the one that was filled last at the end. They are made as they are needed.
#[derive(Debug, Default)]
pub(super) struct Staging {
    buffers: VecDeque<Pinned<bf16>>,
}

impl Staging {
    /// Fills `to` from element `at` on with `count` pieces of `len` elements. `fill` makes a piece by its number, on whatever core, with
    /// what `scratch` made for that core; it writes all of it, because a buffer comes with what it held before.
    ///
    /// Copies take their turn on the stream, one after another: there is one bus, and each copy waits there before the last one ends.
    pub(super) fn send<S>(
        &mut self,
        stream: &Stream,
        to: &mut Tensor<bf16>,
        at: usize,
        [count, len]: [usize; 2],
        scratch: impl Fn() -> S + Sync + Send,
        fill: impl Fn(&mut S, usize, &mut [bf16]) + Sync + Send,
    ) -> Result<()> {
        let at_once = pieces_at_once(len);
        for first in (0..count).step_by(at_once) {
            let pieces = at_once.min(count - first);
            let mut buffer = self.next(stream, pieces * len)?;
            let staged = &mut buffer.as_mut_slice()?[..pieces * len];
            staged
                .par_chunks_exact_mut(len)
                .enumerate()
                .for_each_init(&scratch, |scratch, (piece, out)| fill(scratch, first + piece, out));
            stream.upload_pinned_into(&mut buffer, &mut to.part_mut(at + first * len, [pieces * len])?)?;
            self.buffers.push_back(buffer);
        }
        Ok(())
    }

    /// Gives the buffers back, once their copies are done.
    pub(super) fn clear(&mut self) {
        self.buffers.clear();
    }

    /// A buffer that holds `len` elements: a new one until there are enough, then the one that was filled first.
    fn next(&mut self, stream: &Stream, len: usize) -> Result<Pinned<bf16>> {
        let first = if self.buffers.len() < BUFFERS { None } else { self.buffers.pop_front() };
        match first {
            Some(buffer) if buffer.len() >= len => Ok(buffer),
            _ => Ok(stream.pinned(len.max(LEN))?),
        }
    }
}

/// Pieces of `len` elements that a buffer takes; one that is longer than a buffer gets one of its own.
fn pieces_at_once(len: usize) -> usize {
    (LEN / len.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::{LEN, pieces_at_once};

    #[test]
    fn a_buffer_takes_whole_pieces() {
        assert_eq!((pieces_at_once(1), pieces_at_once(LEN), pieces_at_once(LEN + 1)), (LEN, 1, 1));
        for len in [7, 2048, 5008, LEN / 3 + 1] {
            let pieces = pieces_at_once(len);
            assert!(pieces * len <= LEN && (pieces + 1) * len > LEN, "{len}");
        }
    }
}
