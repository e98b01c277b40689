//! Keys and values on the CPU.

use std::{borrow::Cow, ops::Range};

use anabranch::reference::{RopeTable, paged_rows};

use super::CpuTensor;
use crate::{
    Config, Result, Segment,
    blocks::{BLOCK_SIZE, Written},
};

/// Blocks of float32 rows for every layer, in memory that grows as far as they are used, and the pass under way.
#[derive(Debug)]
pub struct CpuCache {
    pub(super) written: Written,
    pub(super) layers: Vec<Layer>,
    pub(super) pass: Pass,
}

/// What one pass works with.
#[derive(Debug)]
pub(super) struct Pass {
    sequences: Vec<Sequence>,
    /// The cache's row of every token.
    pub(super) rows: Vec<usize>,
    /// cos and sin of every token's position.
    pub(super) rope: RopeTable,
    /// The residual stream.
    pub(super) x: CpuTensor,
}

/// What attention reads of the cache for some of the pass's tokens.
#[derive(Debug)]
pub(super) struct Sequence {
    blocks: Vec<u32>,
    /// Tokens in the cache, those of the pass included.
    length: usize,
    tokens: Range<usize>,
}

/// One layer's two sides. Latent attention keeps its one row a token in `keys`.
#[derive(Debug, Clone, Default)]
pub(super) struct Layer {
    pub(super) keys: Rows,
    pub(super) values: Rows,
}

/// `[blocks, BLOCK_SIZE, width]`, up to the last block that was written.
#[derive(Debug, Clone, Default)]
pub(super) struct Rows(Vec<f32>);

impl CpuCache {
    pub(super) fn new(config: &Config, blocks: usize) -> Self {
        let layers = vec![Layer::default(); config.layers.len()];
        let x = CpuTensor { values: Vec::new(), width: config.hidden_size };
        Self { written: Written::new(blocks), layers, pass: Pass::new(config, &[], x) }
    }
}

impl Pass {
    pub(super) fn new(config: &Config, segments: &[Segment<'_>], x: CpuTensor) -> Self {
        let positions = segments.iter().flat_map(|segment| segment.position..segment.position + segment.len);
        let mut next = 0;
        let sequences = segments.iter().map(|segment| {
            let first = next;
            next += segment.len;
            let length = segment.position + segment.len;
            Sequence { blocks: segment.blocks.to_vec(), length, tokens: first..next }
        });
        Self {
            sequences: sequences.collect(),
            rows: segments.iter().flat_map(Segment::rows).collect(),
            rope: RopeTable::new(&config.rope, positions),
            x,
        }
    }

    /// Every sequence with its tokens.
    pub(super) fn sequences(&self) -> impl Iterator<Item = (&Sequence, &Range<usize>)> {
        self.sequences.iter().map(|sequence| (sequence, &sequence.tokens))
    }
}

impl Rows {
    /// Writes the pass's rows, `width` wide, to where they belong.
    pub(super) fn write(&mut self, rows: &[usize], values: &[f32], width: usize) {
        let blocks = rows.iter().max().map_or(0, |row| row / BLOCK_SIZE + 1);
        self.0.resize(self.0.len().max(blocks * BLOCK_SIZE * width), 0.0);
        for (row, values) in rows.iter().zip(values.chunks_exact(width)) {
            self.0[row * width..(row + 1) * width].copy_from_slice(values);
        }
    }

    /// A sequence's rows one after another.
    pub(super) fn of(&self, sequence: &Sequence, width: usize) -> Result<Cow<'_, [f32]>> {
        Ok(paged_rows(&self.0, [BLOCK_SIZE, width], &sequence.blocks, sequence.length)?)
    }
}
