//! Attention on the GPU: causal, over a KV cache, for several sequences of any lengths in one call.

use half::bf16;

use super::{
    Stream, Tensor, View, ViewMut,
    launch::{Launch, launched},
    sys,
};
use crate::{Error, Result, reference::AttentionShape};

const OPERATION: &str = "attention";

/// Which tokens belong to which sequence, and where its keys lie: in blocks of the cache, which its table names in order
/// (`PagedAttention`, arXiv 2309.06180). The numbers are on the GPU, so that a captured call serves other lengths and tables. Numbers that
/// contradict each other give wrong values, but nothing outside of the buffers is touched.
#[derive(Debug)]
pub struct AttentionBatch<'a> {
    /// `[B + 1]`, ascending from 0 to `T`: sequence `b` has tokens `q_offsets[b]..q_offsets[b + 1]`, its last ones.
    pub q_offsets: View<'a, u32>,
    /// `[B]`: keys of each sequence, those of its tokens here included. A token that sees no key becomes NaN.
    pub kv_lengths: View<'a, u32>,
    /// The tables of all sequences, in a buffer of any length; what lies past them is not read. Sequences may share blocks.
    pub block_table: View<'a, u32>,
    /// `[B]`: where each sequence's table begins: position `s` lies in block `block_table[table_starts[b] + s / block_size]`.
    pub table_starts: View<'a, u32>,
    /// Rows of a block: a power of two, at least 64. A sequence whose rows follow each other is one block of as many.
    pub block_size: usize,
    /// The most tokens of a sequence; those past it are not computed.
    pub max_q_len: usize,
    /// The most keys of a sequence. It decides how the work is split, so that a bound far above the lengths costs time, one below
    /// them too, and neither changes what is computed.
    pub max_kv_len: usize,
}

/// What attention reads.
#[derive(Debug)]
pub struct AttentionInput<'a> {
    /// `[T, num_heads * key_dim]`, rotated.
    pub q: View<'a, bf16>,
    /// `[rows, at least num_kv_heads * key_dim]`: blocks of `block_size` rows, a row a position, of which the first elements are read.
    pub keys: View<'a, bf16>,
    /// `[rows, at least num_kv_heads * value_dim]`; absent where there is one key head and a value is the first `value_dim`
    /// elements of the same row, as in the cache of latent attention.
    pub values: Option<View<'a, bf16>>,
    /// Sequences.
    pub batch: AttentionBatch<'a>,
}

/// Bytes of workspace that [`attention_into`] needs for this input; it depends on sizes only, not on what is on the GPU.
///
/// # Errors
/// Those of [`attention_into`] that concern sizes.
pub fn attention_workspace(stream: &Stream, shape: &AttentionShape, input: &AttentionInput<'_>) -> Result<usize> {
    Launch::begin(OPERATION, stream)?;
    let mut bytes = 0;
    let sizes = Sizes::of(shape, input)?;
    let mut params = sizes.params();
    // Never followed, only compared: whether values are keys decides the kernel.
    params.keys = std::ptr::dangling();
    params.values = if input.values.is_some() { std::ptr::null() } else { params.keys };
    // SAFETY: both point to live values of their types.
    let status = unsafe { sys::anabranch_attention_workspace(&raw const params, &raw mut bytes) };
    launched(OPERATION, status)?;
    Ok(bytes as usize)
}

/// `softmax(scale q K^T + causal mask) V` of every sequence into `out` `[T, num_heads * value_dim]`, as
/// [`reference::attention`](crate::reference::attention()) specifies for one sequence, within bf16 rounding (the softmax's weights are
/// rounded too): FlashAttention-2 (arXiv 2307.08691) for many queries, FlashAttention-3 (arXiv 2407.08608) on Hopper, and keys split
/// among blocks for few.
///
/// Heads are multiples of 8 elements: keys up to 192 and values up to 128, or 576 and 512 where values are keys. For
/// `num_heads / num_kv_heads * max_q_len` above 64 one kernel, which on Hopper may follow a memset of 4 bytes, else one or two. The same
/// call gives the same bits; how keys are split, and so how sums round, depends on the number of sequences and on the two bounds.
///
/// # Errors
/// [`Error::Shape`] if a shape does not fit, [`Error::Setting`] if a size is out of range, [`Error::Place`] if a tensor is elsewhere,
/// [`Error::Launch`] if there is no kernel for the heads, a buffer does not start on 16 bytes, or CUDA refuses the launch.
pub fn attention_into(
    stream: &Stream,
    shape: &AttentionShape,
    input: &AttentionInput<'_>,
    workspace: &mut ViewMut<'_, u8>,
    out: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    let sizes = Sizes::of(shape, input)?;
    let needed = attention_workspace(stream, shape, input)?;
    let launch = Launch::begin(OPERATION, stream)?;
    let batch = &input.batch;
    let q = launch.read("q", &input.q, [sizes.tokens, shape.num_heads * shape.key_dim])?;
    let keys = launch.read("keys", &input.keys, [sizes.rows, sizes.key_stride])?;
    let values =
        launch.read("values", input.values.as_ref().unwrap_or(&input.keys), [sizes.rows, sizes.value_stride])?;
    let q_offsets = launch.read("q_offsets", &batch.q_offsets, [sizes.sequences + 1])?;
    let kv_lengths = launch.read("kv_lengths", &batch.kv_lengths, [sizes.sequences])?;
    let block_table = launch.read("block_table", &batch.block_table, [sizes.table_len])?;
    let table_starts = launch.read("table_starts", &batch.table_starts, [sizes.sequences])?;
    let workspace_bytes = workspace.shape().len();
    let workspace = launch.workspace(workspace, needed)?;
    let out = launch.write("out", out, [sizes.tokens, shape.num_heads * shape.value_dim])?;
    let params = sys::AnabranchAttentionParams {
        q: q.pointer.cast(),
        keys: keys.pointer.cast(),
        values: values.pointer.cast(),
        q_offsets: q_offsets.pointer,
        kv_lengths: kv_lengths.pointer,
        block_table: block_table.pointer,
        table_starts: table_starts.pointer,
        out: out.pointer.cast(),
        workspace: if needed > 0 { workspace.pointer.cast() } else { std::ptr::null_mut() },
        workspace_bytes: workspace_bytes as u64,
        ..sizes.params()
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; what is written is borrowed mutably; the kernels keep to these shapes whatever the numbers on the GPU are; the guards
    // in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_attention(&raw const params, launch.raw_stream()) })
}

/// Attention into new memory: [`attention_into`] with allocations.
///
/// # Errors
/// Those of [`attention_into`], and [`Error::OutOfMemory`].
pub fn attention(stream: &Stream, shape: &AttentionShape, input: &AttentionInput<'_>) -> Result<Tensor<bf16>> {
    let bytes = attention_workspace(stream, shape, input)?;
    let size = [input.q.shape().sizes()[0], shape.num_heads * shape.value_dim];
    // Tokens that no sequence has are zeros, not what the memory held.
    let mut out = stream.zeros(size)?;
    let mut workspace = Tensor::from_parts(stream.alloc(bytes)?, [bytes].into());
    attention_into(stream, shape, input, &mut workspace.view_mut(), &mut out.view_mut())?;
    Ok(out)
}

/// Sizes of a call, as the header's types hold them.
struct Sizes {
    tokens: usize,
    sequences: usize,
    rows: usize,
    block_size: usize,
    table_len: usize,
    key_stride: usize,
    value_stride: usize,
    shape: AttentionShape,
    bounds: [usize; 2],
}

impl Sizes {
    fn of(shape: &AttentionShape, input: &AttentionInput<'_>) -> Result<Self> {
        let batch = &input.batch;
        let matrix = |argument, view: &View<'_, bf16>| match *view.shape().sizes() {
            [rows, width] => Ok((rows, width)),
            _ => Err(Error::Shape {
                operation: OPERATION,
                argument,
                expected: "a matrix".to_owned(),
                got: view.shape().to_string(),
            }),
        };
        let (tokens, _) = matrix("q", &input.q)?;
        let (rows, key_stride) = matrix("keys", &input.keys)?;
        let (_, value_stride) = match &input.values {
            Some(values) => matrix("values", values)?,
            None => (rows, key_stride),
        };
        let AttentionShape { num_heads, num_kv_heads, key_dim, value_dim, .. } = *shape;
        let heads_divide = num_kv_heads > 0 && num_heads > 0 && num_heads.is_multiple_of(num_kv_heads);
        check(heads_divide, "heads", "a multiple of the key heads", || format!("{num_heads} and {num_kv_heads}"))?;
        let one = input.values.is_some() || num_kv_heads == 1;
        check(one, "key heads", "1 where there are no values but the keys", || num_kv_heads.to_string())?;
        let chunks = |size: usize| size > 0 && size.is_multiple_of(8);
        let eights = [key_dim, value_dim, key_stride, value_stride].into_iter().all(chunks);
        check(eights, "elements of a head and of a cache row", "multiples of 8", || {
            format!("{key_dim}, {value_dim}, {key_stride} and {value_stride}")
        })?;
        let (key_width, value_width) = (num_kv_heads.checked_mul(key_dim), num_kv_heads.checked_mul(value_dim));
        let held = key_width.is_some_and(|width| width <= key_stride)
            && value_width.is_some_and(|width| width <= value_stride);
        check(held, "cache rows", "wide enough for all heads", || {
            format!("{key_stride} and {value_stride} for {num_kv_heads} heads of {key_dim} and {value_dim}")
        })?;
        let block_size = batch.block_size;
        check(block_size >= 64 && block_size.is_power_of_two(), "block_size", "a power of two, at least 64", || {
            block_size.to_string()
        })?;
        check(rows.is_multiple_of(block_size), "cache rows", &format!("whole blocks of {block_size}"), || {
            rows.to_string()
        })?;
        let scaled = shape.scale > 0.0 && shape.scale.is_finite();
        check(scaled, "scale", "positive and finite", || shape.scale.to_string())?;
        // Kernels count these in 31 bits.
        let most = 1_usize << 31;
        let slots = tokens.saturating_mul(num_heads);
        let sequences = batch.kv_lengths.shape().len();
        let table_len = batch.block_table.shape().len();
        let bounds = [batch.max_q_len, batch.max_kv_len];
        let counts = [slots, rows, block_size, table_len, key_stride, value_stride, num_heads, sequences];
        let largest = counts.into_iter().chain(bounds).max().unwrap_or(0);
        check(largest < most, "sizes", "below 2^31", || largest.to_string())?;
        Ok(Self { tokens, sequences, rows, block_size, table_len, key_stride, value_stride, shape: *shape, bounds })
    }

    /// The header's struct without pointers.
    fn params(&self) -> sys::AnabranchAttentionParams {
        sys::AnabranchAttentionParams {
            num_tokens: self.tokens as u64,
            num_sequences: self.sequences as u32,
            num_heads: self.shape.num_heads as u32,
            num_kv_heads: self.shape.num_kv_heads as u32,
            key_dim: self.shape.key_dim as u32,
            value_dim: self.shape.value_dim as u32,
            scale: self.shape.scale,
            max_q_len: self.bounds[0] as u32,
            max_kv_len: self.bounds[1] as u32,
            q: std::ptr::null(),
            keys: std::ptr::null(),
            values: std::ptr::null(),
            num_blocks: (self.rows / self.block_size) as u64,
            block_size: self.block_size as u64,
            key_stride: self.key_stride as u64,
            value_stride: self.value_stride as u64,
            q_offsets: std::ptr::null(),
            kv_lengths: std::ptr::null(),
            block_table: std::ptr::null(),
            table_len: self.table_len as u64,
            table_starts: std::ptr::null(),
            out: std::ptr::null_mut(),
            workspace: std::ptr::null_mut(),
            workspace_bytes: 0,
        }
    }
}

fn check(good: bool, setting: &'static str, expected: &str, got: impl FnOnce() -> String) -> Result<()> {
    if good {
        return Ok(());
    }
    Err(Error::Setting { operation: OPERATION, setting, expected: expected.to_owned(), got: got() })
}
