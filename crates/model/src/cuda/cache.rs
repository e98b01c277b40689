//! Keys and values on the GPU, and the batch of the pass under way.

use anabranch::cuda::{AttentionBatch, DecodeStep, RopeTable, View};
use half::bf16;

use super::{
    attention, decode,
    graphs::Graphs,
    memory::{Buffer, Gpu, Purpose, explain},
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
    segments: usize,
    max_q_len: usize,
    max_kv_len: usize,
    /// Rows of every layer's cache.
    pub(super) cache_rows: usize,
    /// Ids `[T]`, offsets `[B + 1]`, lengths `[B]` and table starts `[B]` of the segments, then their tables.
    words: Buffer<u32>,
    /// Positions and cache rows, `[T]` each.
    numbers: Buffer<i32>,
    /// Where latent attention finds heads.
    pub(super) heads: Option<HeadOrder>,
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

/// The longest context is rounded up to a multiple of this: steps in between have the same launches.
const CONTEXT_STEP: usize = 256;

impl CudaCache {
    pub(super) fn new(gpu: &Gpu, config: &Config, blocks: usize) -> Result<Self> {
        let rows = blocks.saturating_mul(BLOCK_SIZE);
        let layers = Self::layers(gpu, config, rows)?;
        let rope = RopeTable::new(&gpu.stream, &config.rope)?;
        let batch = DeviceBatch::new(gpu, attention::latent_heads(config), rows)?;
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
        let mut numbers = Numbers::default();
        batch.segments.iter().for_each(|segment| numbers.push(segment));
        self.work.reserve(gpu, batch.ids.len())?;
        self.batch.set(gpu, batch, &numbers)
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
    max_q_len: usize,
}

impl Numbers {
    fn push(&mut self, segment: &Segment<'_>) {
        let Segment { blocks, position, len } = *segment;
        self.offsets.push(self.positions.len() as u32);
        self.lengths.push((position + len) as u32);
        self.starts.push(self.tables.len() as u32);
        self.tables.extend_from_slice(&blocks[..blocks_for(position + len)]);
        self.positions.extend((position..position + len).map(|position| position as i32));
        self.rows.extend(segment.rows().map(|row| row as i32));
        self.max_q_len = self.max_q_len.max(len);
    }
}

impl DeviceBatch {
    fn new(gpu: &Gpu, latent_heads: Option<usize>, cache_rows: usize) -> Result<Self> {
        let heads = latent_heads.map(|num_heads| HeadOrder::new(gpu, num_heads)).transpose()?;
        Ok(Self {
            tokens: 0,
            segments: 0,
            max_q_len: 0,
            max_kv_len: 0,
            cache_rows,
            words: gpu.zeros(Purpose::Workspace, [0])?,
            numbers: gpu.zeros(Purpose::Workspace, [0])?,
            heads,
        })
    }

    fn set(&mut self, gpu: &Gpu, batch: &Batch<'_>, numbers: &Numbers) -> Result<()> {
        let (tokens, segments) = (batch.ids.len(), batch.segments.len());
        let end = [tokens as u32];
        let words = [batch.ids, &numbers.offsets, &end, &numbers.lengths, &numbers.starts, &numbers.tables].concat();
        let pairs = [numbers.positions.as_slice(), &numbers.rows].concat();
        // Room for tables of the whole cache, which only sequences that share blocks pass: decode steps find it as it is.
        let cached = (self.cache_rows / BLOCK_SIZE).saturating_sub(numbers.tables.len());
        gpu.reserve(&mut self.words, words.len() + cached)?;
        gpu.reserve(&mut self.numbers, pairs.len())?;
        gpu.stream.upload_into(&words, &mut self.words.part_mut(0, [words.len()])?)?;
        gpu.stream.upload_into(&pairs, &mut self.numbers.part_mut(0, [pairs.len()])?)?;
        if let Some(heads) = &mut self.heads {
            heads.set(gpu, tokens)?;
        }
        let longest = numbers.lengths.iter().max().map_or(0, |length| *length as usize);
        (self.tokens, self.segments) = (tokens, segments);
        (self.max_q_len, self.max_kv_len) = (numbers.max_q_len, longest.next_multiple_of(CONTEXT_STEP));
        Ok(())
    }

    /// The longest context, rounded up.
    pub(super) fn max_kv_len(&self) -> usize {
        self.max_kv_len
    }

    pub(super) fn ids(&self) -> Result<View<'_, u32>> {
        Ok(self.words.part(0, [self.tokens])?)
    }

    pub(super) fn positions(&self) -> Result<View<'_, i32>> {
        Ok(self.numbers.part(0, [self.tokens])?)
    }

    /// Where each token's keys go.
    pub(super) fn rows(&self) -> Result<View<'_, i32>> {
        Ok(self.numbers.part(self.tokens, [self.tokens])?)
    }

    pub(super) fn attention(&self) -> Result<AttentionBatch<'_>> {
        let (tokens, segments) = (self.tokens, self.segments);
        let tables = tokens + 3 * segments + 1;
        Ok(AttentionBatch {
            q_offsets: self.words.part(tokens, [segments + 1])?,
            kv_lengths: self.words.part(tokens + segments + 1, [segments])?,
            table_starts: self.words.part(tokens + 2 * segments + 1, [segments])?,
            // All that is left of the buffer, which tables that grow do not change.
            block_table: self.words.part(tables, [self.words.shape().len() - tables])?,
            block_size: BLOCK_SIZE,
            max_q_len: self.max_q_len,
            max_kv_len: self.max_kv_len,
        })
    }
}

impl HeadOrder {
    fn new(gpu: &Gpu, num_heads: usize) -> Result<Self> {
        let offsets = gpu.zeros(Purpose::Workspace, [num_heads + 1])?;
        Ok(Self { num_heads, tokens: 0, offsets, rows: gpu.zeros(Purpose::Workspace, [0])? })
    }

    /// Steps with as many tokens as the last one find everything in place.
    fn set(&mut self, gpu: &Gpu, tokens: usize) -> Result<()> {
        if self.tokens == tokens {
            return Ok(());
        }
        let heads = self.num_heads;
        let offsets: Vec<u32> = (0..=heads).map(|head| (head * tokens) as u32).collect();
        let by_head = (0..heads).flat_map(|head| (0..tokens).map(move |token| (token * heads + head) as u32));
        let by_token = (0..tokens).flat_map(|token| (0..heads).map(move |head| (head * tokens + token) as u32));
        let rows: Vec<u32> = by_head.chain(by_token).collect();
        gpu.reserve(&mut self.rows, rows.len())?;
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
