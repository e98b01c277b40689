//! Keys and values on the GPU, and the batch of the pass under way.

use anabranch::cuda::{AttentionBatch, DecodeStep, RopeTable, View};
use half::bf16;

use super::{
    attention::{self, LatentSizes},
    decode,
    graphs::Graphs,
    memory::{Buffer, Gpu, Purpose, explain},
    parts::{LatentBatch, Part},
    workspace::Workspace,
};
use crate::{
    Batch, Config, Error, Result, Segment,
    blocks::{BLOCK_SIZE, Written, blocks_for},
};

/// Keys and values of all layers, in blocks of rows. With them the buffers of a pass, so that decoding runs from the same memory step by
/// step.
#[derive(Debug)]
pub struct CudaCache {
    /// Before the buffers that they work with.
    pub(super) graphs: Graphs,
    pub(super) layers: Vec<LayerCache>,
    written: Written,
    pub(super) rope: RopeTable,
    pub(super) batch: DeviceBatch,
    pub(super) work: Workspace,
    /// Where a token goes through all layers in one launch.
    pub(super) step: Option<DecodeStep>,
}

/// One layer's rows.
#[derive(Debug)]
pub(super) struct LayerCache {
    /// `[rows, key heads * key_dim]`.
    pub(super) keys: Buffer<bf16>,
    /// `[rows, key heads * value_dim]`; of no width where values are part of the keys' rows.
    pub(super) values: Buffer<bf16>,
}

/// A batch's numbers on the GPU.
#[derive(Debug)]
pub(super) struct DeviceBatch {
    pub(super) tokens: usize,
    /// All of it.
    pub(super) all: Part,
    /// Rows of every layer's cache.
    pub(super) cache_rows: usize,
    /// Ids `[T]`, offsets `[B + 1]`, lengths `[B]` and table starts `[B]` of the segments, then their tables.
    words: Buffer<u32>,
    /// Positions and cache rows, `[T]` each.
    numbers: Buffer<i32>,
    /// Where attention is latent.
    pub(super) latent: Option<LatentBatch>,
}

impl CudaCache {
    pub(super) fn new(gpu: &Gpu, config: &Config, blocks: usize) -> Result<Self> {
        let rows = blocks.saturating_mul(BLOCK_SIZE);
        let layers = Self::layers(gpu, config, rows)?;
        let rope = RopeTable::new(&gpu.stream, &config.rope)?;
        let batch = DeviceBatch::new(gpu, LatentSizes::of(&config.attention), rows)?;
        let (written, work) = (Written::new(blocks), Workspace::new(gpu, config)?);
        let step = decode::step(gpu, config)?;
        Ok(Self { graphs: Graphs::default(), layers, written, rope, batch, work, step })
    }

    fn layers(gpu: &Gpu, config: &Config, rows: usize) -> Result<Vec<LayerCache>> {
        let [key_width, value_width] = attention::cache_widths(config);
        let count = config.layers.len();
        let row_bytes = (2 * (key_width + value_width) * count) as u64;
        let needed = row_bytes.saturating_mul(rows as u64);
        let free = gpu.free()?;
        let what = || format!("a cache of {rows} tokens");
        let advice = |free: u64| format!("about {} tokens would fit", free / row_bytes);
        if needed > free {
            return Err(Error::GpuMemory { what: what(), needed, free, advice: advice(free) });
        }
        let layer = |_| {
            Ok(LayerCache {
                keys: gpu.zeros(Purpose::Cache, [rows, key_width])?,
                values: gpu.zeros(Purpose::Cache, [rows, value_width])?,
            })
        };
        let layers: Result<_> = (0..count).map(layer).collect();
        layers.map_err(|error| explain(error, what, advice))
    }

    /// Checks that a batch continues its sequences, and brings its numbers to the GPU.
    pub(super) fn begin(&mut self, gpu: &Gpu, batch: &Batch<'_>) -> Result<()> {
        self.written.note(batch.segments)?;
        self.work.reserve(gpu, batch.ids.len())?;
        self.batch.set(gpu, batch)?;
        let Some(latent) = &mut self.batch.latent else { return Ok(()) };
        let all = batch.segments.len();
        let absorbed = latent.sizes.absorbed(batch.segments);
        let blocks = Part::of(batch.segments, absorbed..all).blocks.len();
        let fits = self.work.expanded.reserve(gpu, &latent.sizes, blocks)?;
        latent.set(gpu, batch.segments, if fits { absorbed } else { all })
    }
}

/// A batch's numbers on their way.
#[derive(Debug, Default)]
struct Numbers {
    offsets: Vec<u32>,
    lengths: Vec<u32>,
    starts: Vec<u32>,
    tables: Vec<u32>,
    positions: Vec<i32>,
    rows: Vec<i32>,
}

impl Numbers {
    fn of(segments: &[Segment<'_>]) -> Self {
        let mut numbers = Self::default();
        segments.iter().for_each(|segment| numbers.push(segment));
        numbers
    }

    fn push(&mut self, segment: &Segment<'_>) {
        let Segment { blocks, position, len } = *segment;
        self.offsets.push(self.positions.len() as u32);
        self.lengths.push((position + len) as u32);
        self.starts.push(self.tables.len() as u32);
        self.tables.extend_from_slice(&blocks[..blocks_for(position + len)]);
        self.positions.extend((position..position + len).map(|position| position as i32));
        self.rows.extend(segment.rows().map(|row| row as i32));
    }
}

impl DeviceBatch {
    fn new(gpu: &Gpu, latent: Option<LatentSizes>, cache_rows: usize) -> Result<Self> {
        let latent = latent.map(|sizes| LatentBatch::new(gpu, sizes)).transpose()?;
        Ok(Self {
            tokens: 0,
            all: Part::default(),
            cache_rows,
            words: gpu.zeros(Purpose::Workspace, [0])?,
            numbers: gpu.zeros(Purpose::Workspace, [0])?,
            latent,
        })
    }

    fn set(&mut self, gpu: &Gpu, batch: &Batch<'_>) -> Result<()> {
        let numbers = Numbers::of(batch.segments);
        let tokens = batch.ids.len();
        let end = [tokens as u32];
        let words = [batch.ids, &numbers.offsets, &end, &numbers.lengths, &numbers.starts, &numbers.tables].concat();
        let pairs = [numbers.positions.as_slice(), &numbers.rows].concat();
        // Room for tables of the whole cache, which only sequences that share blocks pass: decode steps find it as it is.
        let cached = (self.cache_rows / BLOCK_SIZE).saturating_sub(numbers.tables.len());
        gpu.reserve(&mut self.words, words.len() + cached)?;
        gpu.reserve(&mut self.numbers, pairs.len())?;
        gpu.stream.upload_into(&words, &mut self.words.part_mut(0, [words.len()])?)?;
        gpu.stream.upload_into(&pairs, &mut self.numbers.part_mut(0, [pairs.len()])?)?;
        (self.tokens, self.all) = (tokens, Part::of(batch.segments, 0..batch.segments.len()));
        Ok(())
    }

    pub(super) fn ids(&self) -> Result<View<'_, u32>> {
        Ok(self.words.part(0, [self.tokens])?)
    }

    pub(super) fn positions(&self, part: &Part) -> Result<View<'_, i32>> {
        Ok(self.numbers.part(part.tokens.start, [part.tokens.len()])?)
    }

    /// Where each token's keys go.
    pub(super) fn rows(&self, part: &Part) -> Result<View<'_, i32>> {
        Ok(self.numbers.part(self.tokens + part.tokens.start, [part.tokens.len()])?)
    }

    /// The blocks that a part's tables name.
    pub(super) fn tables(&self, part: &Part) -> Result<View<'_, u32>> {
        Ok(self.words.part(self.first_table() + part.blocks.start, [part.blocks.len()])?)
    }

    fn first_table(&self) -> usize {
        self.tokens + 3 * self.all.segments.len() + 1
    }

    /// Of a part's segments. Tokens are counted from the batch's first one on.
    pub(super) fn attention(&self, part: &Part) -> Result<AttentionBatch<'_>> {
        let (tokens, all, tables) = (self.tokens, self.all.segments.len(), self.first_table());
        let (first, segments) = (part.segments.start, part.segments.len());
        Ok(AttentionBatch {
            q_offsets: self.words.part(tokens + first, [segments + 1])?,
            kv_lengths: self.words.part(tokens + all + 1 + first, [segments])?,
            table_starts: self.words.part(tokens + 2 * all + 1 + first, [segments])?,
            // All that is left of the buffer, which tables that grow do not change.
            block_table: self.words.part(tables, [self.words.shape().len() - tables])?,
            block_size: BLOCK_SIZE,
            max_q_len: part.max_q_len,
            max_kv_len: part.max_kv_len,
        })
    }
}
