//! Embedding and addition on the GPU.

use half::bf16;

use super::{
    Stream, Tensor, View, ViewMut,
    checks::{matrix, size},
    launch::Launch,
    sys,
};
use crate::Result;

const EMBEDDING: &str = "embedding";
const ADD: &str = "add";

/// Rows of `table` `[V, d]`, one for each of `ids` `[T]`, into `out` `[T, d]`, as
/// [`reference::embedding`](crate::reference::embedding) specifies, except that an id which is not below V makes its row NaN:
/// a device cannot report it without being waited for. Bound by memory: `4 T d` bytes.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if a shape does not fit, [`Error::Place`](crate::Error::Place) if a tensor is
/// elsewhere, [`Error::Launch`](crate::Error::Launch) if d is not a multiple of 8 or a row does not start on 16 bytes.
pub fn embedding_into(
    stream: &Stream,
    table: &View<'_, bf16>,
    ids: &View<'_, u32>,
    out: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    let [vocab_size, hidden_size] = matrix(EMBEDDING, "table", table.shape())?;
    let num_tokens = ids.shape().len();
    let launch = Launch::begin(EMBEDDING, stream)?;
    let table = launch.read("table", table, [vocab_size, hidden_size])?;
    let ids = launch.read("ids", ids, [num_tokens])?;
    let out = launch.write("out", out, [num_tokens, hidden_size])?;
    let params = sys::AnabranchEmbeddingParams {
        num_tokens: num_tokens as u64,
        vocab_size: vocab_size as u64,
        hidden_size: size(EMBEDDING, "hidden_size", hidden_size)?,
        table: table.pointer.cast(),
        ids: ids.pointer,
        out: out.pointer.cast(),
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; ids beyond the table are not followed; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_embedding(&raw const params, launch.raw_stream()) })
}

/// [`embedding_into`] with an allocation: `[T, d]`.
///
/// # Errors
/// Those of [`embedding_into`], and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn embedding(stream: &Stream, table: &View<'_, bf16>, ids: &View<'_, u32>) -> Result<Tensor<bf16>> {
    let [_, hidden_size] = matrix(EMBEDDING, "table", table.shape())?;
    let num_tokens = ids.shape().len();
    let mut out = Tensor::from_parts(stream.alloc(num_tokens * hidden_size)?, [num_tokens, hidden_size].into());
    embedding_into(stream, table, ids, &mut out.view_mut())?;
    Ok(out)
}

/// `x += y`, in float32, rounded once; both of any one shape. Bound by memory: 6 bytes an element.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if the shapes differ, [`Error::Place`](crate::Error::Place) if a tensor is elsewhere.
pub fn add_into(stream: &Stream, x: &mut ViewMut<'_, bf16>, y: &View<'_, bf16>) -> Result<()> {
    let shape = x.shape();
    let launch = Launch::begin(ADD, stream)?;
    let x = launch.write("x", x, shape)?;
    let y = launch.read("y", y, shape)?;
    let params = sys::AnabranchAddParams { num_elements: shape.len() as u64, x: x.pointer.cast(), y: y.pointer.cast() };
    // SAFETY: both are device memory of this many elements, checked by `launch`, on the stream's GPU; `x` is borrowed
    // mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_add(&raw const params, launch.raw_stream()) })
}
