//! Segments of a pass that are attended to alike.

use std::ops::Range;

use anabranch::cuda::{AttentionBatch, View};

use super::{
    attention::LatentSizes,
    cache::DeviceBatch,
    memory::{Buffer, Gpu, Purpose},
};
use crate::{Result, Segment, blocks::blocks_for};

/// The longest context is rounded up to a multiple of this: steps in between have the same launches.
const CONTEXT_STEP: usize = 256;

/// Segments that follow each other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) segments: Range<usize>,
    pub(super) tokens: Range<usize>,
    /// Entries of the tables, which lie one after another.
    pub(super) blocks: Range<usize>,
    pub(super) max_q_len: usize,
    /// The longest context, rounded up.
    pub(super) max_kv_len: usize,
}

impl Part {
    pub(super) fn of(all: &[Segment<'_>], segments: Range<usize>) -> Self {
        let end = |segment: &Segment<'_>| segment.position + segment.len;
        let (before, own) = (&all[..segments.start], &all[segments.clone()]);
        let tokens = |segments: &[Segment<'_>]| segments.iter().map(|segment| segment.len).sum::<usize>();
        let blocks = |segments: &[Segment<'_>]| segments.iter().map(|segment| blocks_for(end(segment))).sum::<usize>();
        let from = |first: usize, count: usize| first..first + count;
        Self {
            segments,
            tokens: from(tokens(before), tokens(own)),
            blocks: from(blocks(before), blocks(own)),
            max_q_len: own.iter().map(|segment| segment.len).max().unwrap_or(0),
            max_kv_len: own.iter().map(end).max().unwrap_or(0).next_multiple_of(CONTEXT_STEP),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// How latent attention attends to the pass under way: to its first segments in latents, to its last with expanded heads.
#[derive(Debug)]
pub(super) struct LatentBatch {
    pub(super) sizes: LatentSizes,
    pub(super) absorbed: Part,
    pub(super) expanded: Part,
    /// Of the absorbed tokens.
    pub(super) order: HeadOrder,
    /// Of the expanded segments: see [`expanded_words`].
    words: Buffer<u32>,
}

impl LatentBatch {
    pub(super) fn new(gpu: &Gpu, sizes: LatentSizes) -> Result<Self> {
        let (absorbed, expanded) = (Part::default(), Part::default());
        let words = gpu.zeros(Purpose::Workspace, [0])?;
        Ok(Self { sizes, absorbed, expanded, order: HeadOrder::new(gpu, sizes.num_heads)?, words })
    }

    /// The first `absorbed` of the segments in latents.
    pub(super) fn set(&mut self, gpu: &Gpu, segments: &[Segment<'_>], absorbed: usize) -> Result<()> {
        self.absorbed = Part::of(segments, 0..absorbed);
        self.expanded = Part::of(segments, absorbed..segments.len());
        if !self.expanded.is_empty() {
            let words = expanded_words(&segments[absorbed..]);
            gpu.reserve(&mut self.words, words.len().next_power_of_two())?;
            gpu.stream.upload_into(&words, &mut self.words.part_mut(0, [words.len()])?)?;
        }
        self.order.set(gpu, self.absorbed.tokens.len(), self.expanded.tokens.end)
    }

    /// The expanded segments, whose tokens and rows are counted from their first on.
    pub(super) fn expanded_attention<'a>(&'a self, batch: &'a DeviceBatch) -> Result<AttentionBatch<'a>> {
        let (segments, blocks) = (self.expanded.segments.len(), self.expanded.blocks.len());
        Ok(AttentionBatch {
            q_offsets: self.words.part(0, [segments + 1])?,
            table_starts: self.words.part(segments + 1, [segments])?,
            block_table: self.words.part(2 * segments + 1, [blocks])?,
            ..batch.attention(&self.expanded)?
        })
    }
}

/// `[B + 1]` offsets of tokens and `[B]` starts of tables, then the tables: expanded rows lie one segment after another, so that these
/// count from 0 on.
fn expanded_words(segments: &[Segment<'_>]) -> Vec<u32> {
    let ends = |lens: &mut dyn Iterator<Item = usize>| -> Vec<u32> {
        let ends = lens.scan(0, |end, len| {
            *end += len as u32;
            Some(*end)
        });
        [0].into_iter().chain(ends).collect()
    };
    let mut words = ends(&mut segments.iter().map(|segment| segment.len));
    let starts = ends(&mut segments.iter().map(|segment| blocks_for(segment.position + segment.len)));
    let (blocks, starts) = starts.split_last().map_or((0, &[][..]), |(blocks, starts)| (*blocks, starts));
    words.extend(starts);
    words.extend(0..blocks);
    words
}

/// The order of rows for products by head, whose rows must lie head by head.
#[derive(Debug)]
pub(super) struct HeadOrder {
    num_heads: usize,
    tokens: usize,
    /// `[H + 1]`: a head's first row.
    offsets: Buffer<u32>,
    /// `[H T]` rows of tokens in the order of heads, and back.
    rows: Buffer<u32>,
}

impl HeadOrder {
    fn new(gpu: &Gpu, num_heads: usize) -> Result<Self> {
        let offsets = gpu.zeros(Purpose::Workspace, [num_heads + 1])?;
        Ok(Self { num_heads, tokens: 0, offsets, rows: gpu.zeros(Purpose::Workspace, [0])? })
    }

    /// Steps with as many tokens as the last one that had some find everything in place. There is room for as many as the largest batch had, so that
    /// decode steps beside prompts find it as it is.
    fn set(&mut self, gpu: &Gpu, tokens: usize, batch: usize) -> Result<()> {
        let room = 2 * self.num_heads * batch;
        if self.rows.shape().len() < room {
            // What it held is lost.
            self.tokens = 0;
            gpu.reserve(&mut self.rows, room)?;
        }
        if self.tokens == tokens || tokens == 0 {
            return Ok(());
        }
        let heads = self.num_heads;
        let offsets: Vec<u32> = (0..=heads).map(|head| (head * tokens) as u32).collect();
        let by_head = (0..heads).flat_map(|head| (0..tokens).map(move |token| (token * heads + head) as u32));
        let by_token = (0..tokens).flat_map(|token| (0..heads).map(move |head| (head * tokens + token) as u32));
        let rows: Vec<u32> = by_head.chain(by_token).collect();
        gpu.stream.upload_into(&offsets, &mut self.offsets.view_mut())?;
        gpu.stream.upload_into(&rows, &mut self.rows.part_mut(0, [rows.len()])?)?;
        self.tokens = tokens;
        Ok(())
    }

    pub(super) fn offsets(&self) -> View<'_, u32> {
        self.offsets.view()
    }

    /// For each row in the order of heads, the row `token * H + head` that it comes from.
    pub(super) fn by_head(&self) -> Result<View<'_, u32>> {
        Ok(self.rows.part(0, [self.num_heads * self.tokens])?)
    }

    /// For each row `token * H + head`, the one in the order of heads.
    pub(super) fn by_token(&self) -> Result<View<'_, u32>> {
        let rows = self.num_heads * self.tokens;
        Ok(self.rows.part(rows, [rows])?)
    }
}

#[cfg(test)]
mod tests {
    use super::{Part, expanded_words};
    use crate::Segment;

    #[test]
    fn parts_count_what_lies_before_them() {
        let blocks: Vec<u32> = (10..20).collect();
        let segment = |position, len| Segment { blocks: &blocks, position, len };
        let segments = [segment(64, 1), segment(3, 1), segment(64, 300), segment(0, 64)];
        let first = Part { segments: 0..2, tokens: 0..2, blocks: 0..3, max_q_len: 1, max_kv_len: 256 };
        let last = Part { segments: 2..4, tokens: 2..366, blocks: 3..10, max_q_len: 300, max_kv_len: 512 };
        assert_eq!(Part::of(&segments, 0..2), first);
        assert_eq!(Part::of(&segments, 2..4), last);
        assert!(Part::of(&segments, 4..4).is_empty() && Part::of(&[], 0..0).is_empty());
        assert_eq!(expanded_words(&segments[2..]), [0, 300, 364, 0, 6, 0, 1, 2, 3, 4, 5, 6]);
    }
}
