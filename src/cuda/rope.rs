//! Rotary embedding and cache write on the GPU, in one launch.

use half::bf16;

use super::{
    HeadRange, Stream, Tensor, View, ViewMut,
    checks::{matrix, size},
    launch::{Launch, Pointer},
    sys,
};
use crate::{Error, Result, Rope, RopeLayout};

const OPERATION: &str = "rope";
const NO_HEADS: sys::AnabranchHeads =
    sys::AnabranchHeads { data: std::ptr::null_mut(), stride: 0, num_heads: 0, head_dim: 0, first: 0 };
const NO_NORM: sys::AnabranchHeadNorm = sys::AnabranchHeadNorm { weight: std::ptr::null(), width: 0, eps: 0.0 };

/// A rotary embedding with its frequencies on the GPU. Cosines and sines are computed where they are used.
#[derive(Debug)]
pub struct RopeTable {
    rope: Rope,
    frequencies: Tensor<f32>,
}

impl RopeTable {
    /// Uploads the frequencies.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Driver`] for anything else.
    pub fn new(stream: &Stream, rope: &Rope) -> Result<Self> {
        let frequencies = rope.frequencies();
        Ok(Self { rope: *rope, frequencies: stream.upload([frequencies.len()], &frequencies)? })
    }

    /// The embedding.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// `[rotary_dim / 2]`.
    pub(super) fn frequencies(&self) -> View<'_, f32> {
        self.frequencies.view()
    }
}

/// An RMS norm of the first elements of every head, as many as `weight` has: all of them, or a cached row's latent before its
/// rotated part.
#[derive(Debug)]
pub struct HeadNorm<'a> {
    /// `[n]`, at most a head and at most 512.
    pub weight: View<'a, f32>,
    /// Added to the mean square; not negative.
    pub eps: f32,
}

/// Where keys and values come from and go to.
#[derive(Debug)]
pub struct RopeCache<'a> {
    /// `[T, columns]`: holds the keys; `None` if they are in the queries' matrix.
    pub keys: Option<View<'a, bf16>>,
    /// Where they are in its rows.
    pub k: HeadRange,
    /// The first element of a key that is rotated.
    pub k_first: usize,
    /// The keys' norm, before anything else.
    pub k_norm: Option<HeadNorm<'a>>,
    /// `[T, columns]`: holds the values; `None` if they are in the queries' matrix.
    pub values: Option<View<'a, bf16>>,
    /// Where they are in its rows; no heads if there are none (a latent cache).
    pub v: HeadRange,
    /// `[T]`: the cache's row of each token, no two the same. A token whose row is outside of the cache is not written.
    pub rows: View<'a, i32>,
    /// `[N, k.num_heads, k.head_dim]`.
    pub k_cache: ViewMut<'a, bf16>,
    /// `[N, v.num_heads, v.head_dim]`.
    pub v_cache: ViewMut<'a, bf16>,
}

/// What is rotated.
#[derive(Debug)]
pub struct RopeBuffers<'a> {
    /// `[T]`, on the device.
    pub positions: View<'a, i32>,
    /// `[T, columns]`: holds the queries, which are rotated in place, and maybe keys and values.
    pub queries: ViewMut<'a, bf16>,
    /// Where they are in its rows.
    pub q: HeadRange,
    /// The first element of a query that is rotated.
    pub q_first: usize,
    /// The queries' norm, before anything else.
    pub q_norm: Option<HeadNorm<'a>>,
    /// Keys and values, if they are cached.
    pub cache: Option<RopeCache<'a>>,
    /// Queries, keys and values are clamped to `-clip..=clip` before rotation (OLMoE's `clip_qkv`).
    pub clip: Option<f32>,
}

/// Rotates queries in place, as [`reference::rotate`](crate::reference::rotate) specifies, and writes rotated keys, and values
/// as they are, into a cache. Norms come before, as [`reference::rms_norm_heads`](crate::reference::rms_norm_heads) has them, and
/// are rounded to bf16 as if written: heads of whole vectors and up to 256 normed elements get the bits that
/// [`rms_norm_heads_into`](super::rms_norm_heads_into) would give them. Angles are float32 products of position and frequency, as the reference has them; the rest is
/// float32, rounded once. Bound by memory: each element that is rotated or copied is read once and written once; 16 bytes at a
/// time where columns, sizes and pointers are multiples of that, else element by element.
///
/// # Errors
/// [`Error::Shape`] if a shape does not fit or rows do not hold the heads, [`Error::Place`] if a tensor is elsewhere,
/// [`Error::Launch`] if more than a head or more than 1,024 elements are rotated, more than 512 normed, the clip is not positive or
/// an `eps` negative.
pub fn rope_into(stream: &Stream, table: &RopeTable, buffers: &mut RopeBuffers<'_>) -> Result<()> {
    let RopeBuffers { positions, queries, q, q_first, q_norm, cache, clip } = buffers;
    let [num_tokens, columns] = matrix(OPERATION, "queries", queries.shape())?;
    q.check(OPERATION, "queries", columns)?;
    let launch = Launch::begin(OPERATION, stream)?;
    let frequencies = table.frequencies.view();
    let pairs = table.rope.rotary_dim() / 2;
    let frequencies = launch.read("frequencies", &frequencies, [pairs])?;
    let positions = launch.read("positions", positions, [num_tokens])?;
    let queries = launch.write("queries", queries, [num_tokens, columns])?;
    let mut params = sys::AnabranchRopeParams {
        num_tokens: num_tokens as u64,
        layout: match table.rope.layout() {
            RopeLayout::Half => sys::AnabranchRopeLayout::ANABRANCH_ROPE_LAYOUT_HALF,
            RopeLayout::Interleaved => sys::AnabranchRopeLayout::ANABRANCH_ROPE_LAYOUT_INTERLEAVED,
        },
        rotary_dim: size(OPERATION, "rotary_dim", table.rope.rotary_dim())?,
        frequencies: frequencies.pointer,
        attention_factor: table.rope.attention_factor() as f32,
        clip: clip.unwrap_or(f32::INFINITY),
        positions: positions.pointer,
        q: heads(queries.pointer, columns, *q, *q_first)?,
        k: NO_HEADS,
        v: NO_HEADS,
        q_norm: NO_NORM,
        k_norm: NO_NORM,
        cache_rows: std::ptr::null(),
        num_cache_rows: 0,
        k_cache: std::ptr::null_mut(),
        v_cache: std::ptr::null_mut(),
    };
    // Guards of what is not always there, until after the launch.
    let mut weights: [Pointer<'_, f32>; 2] = [Pointer::null(), Pointer::null()];
    let mut sources: [Pointer<'_, bf16>; 2] = [Pointer::null(), Pointer::null()];
    let mut caches: [Pointer<'_, bf16>; 2] = [Pointer::null(), Pointer::null()];
    let mut rows = Pointer::null();
    if let Some(norm) = q_norm {
        (params.q_norm, weights[0]) = head_norm(launch, "q_norm", norm, q.head_dim)?;
    }
    if let Some(cache) = cache {
        if let Some(norm) = &cache.k_norm {
            (params.k_norm, weights[1]) = head_norm(launch, "k_norm", norm, cache.k.head_dim)?;
        }
        let capacity = cache.k_cache.shape().sizes()[0];
        let parts = [("keys", &cache.keys, cache.k, cache.k_first), ("values", &cache.values, cache.v, 0)];
        let described = [&mut params.k, &mut params.v];
        for (((argument, source, range, first), described), guard) in parts.into_iter().zip(described).zip(&mut sources)
        {
            let (pointer, columns) = match source {
                Some(source) => {
                    let [_, columns] = matrix(OPERATION, argument, source.shape())?;
                    *guard = launch.read(argument, source, [num_tokens, columns])?;
                    (guard.pointer, columns)
                }
                None => (queries.pointer, columns),
            };
            range.check(OPERATION, argument, columns)?;
            *described = heads(pointer, columns, range, first)?;
        }
        if cache.keys.is_none() && overlap(*q, cache.k) || cache.values.is_none() && overlap(*q, cache.v) {
            return Err(Error::Setting {
                operation: OPERATION,
                setting: "columns of queries, keys and values",
                expected: "apart".to_owned(),
                got: format!("{q:?}, {:?} and {:?}", cache.k, cache.v),
            });
        }
        rows = launch.read("rows", &cache.rows, [num_tokens])?;
        let shape = |range: HeadRange| [capacity, range.num_heads, range.head_dim];
        caches[0] = launch.write("k_cache", &mut cache.k_cache, shape(cache.k))?;
        caches[1] = launch.write("v_cache", &mut cache.v_cache, shape(cache.v))?;
        params.num_cache_rows = capacity as u64;
    }
    params.cache_rows = rows.pointer;
    params.k_cache = caches[0].pointer.cast();
    params.v_cache = caches[1].pointer.cast();
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; heads lie within their rows, and queries apart from what is read; rows beyond the cache are not followed; what is
    // written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_rope(&raw const params, launch.raw_stream()) })
}

fn overlap(a: HeadRange, b: HeadRange) -> bool {
    a.width() > 0 && b.width() > 0 && a.column < b.column + b.width() && b.column < a.column + a.width()
}

fn heads(data: *mut bf16, columns: usize, range: HeadRange, first: usize) -> Result<sys::AnabranchHeads> {
    Ok(sys::AnabranchHeads {
        data: data.wrapping_add(range.column).cast(),
        stride: columns as u64,
        num_heads: size(OPERATION, "num_heads", range.num_heads)?,
        head_dim: size(OPERATION, "head_dim", range.head_dim)?,
        first: size(OPERATION, "first rotated element", first)?,
    })
}

fn head_norm<'a>(
    launch: Launch<'a>,
    argument: &'static str,
    norm: &'a HeadNorm<'_>,
    head_dim: usize,
) -> Result<(sys::AnabranchHeadNorm, Pointer<'a, f32>)> {
    let width = norm.weight.shape().len();
    if !(1..=head_dim).contains(&width) {
        return Err(Error::Shape {
            operation: OPERATION,
            argument,
            expected: format!("1 to {head_dim} long"),
            got: width.to_string(),
        });
    }
    let weight = launch.read(argument, &norm.weight, [width])?;
    let described = sys::AnabranchHeadNorm {
        weight: weight.pointer,
        width: size(OPERATION, "width of a norm", width)?,
        eps: norm.eps,
    };
    Ok((described, weight))
}
