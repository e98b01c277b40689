//! RMS norm on the GPU: of rows, of the residual stream after what is added to it, and of heads in place.

use half::bf16;

use super::{
    Float, HeadRange, Stream, Tensor, View, ViewMut,
    checks::{dtype, matrix, size},
    launch::Launch,
    sys,
};
use crate::Result;

const OPERATION: &str = "rms_norm";

/// `out = x / sqrt(mean(x^2) + eps) * weight` over the rows of `x` `[T, d]`, as
/// [`reference::rms_norm`](crate::reference::rms_norm) specifies: float32 inside, rounded once. `weight` is `[d]`, bf16 or
/// float32. Bound by memory: `4 T d` bytes.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if a shape does not fit, [`Error::Place`](crate::Error::Place) if a tensor is
/// elsewhere, [`Error::Launch`](crate::Error::Launch) if d is not a multiple of 8 or more than 65,536, a row does not start on
/// 16 bytes, or `eps` is negative.
pub fn rms_norm_into<W: Float>(
    stream: &Stream,
    x: &View<'_, bf16>,
    weight: &View<'_, W>,
    eps: f32,
    out: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    let [num_tokens, width] = matrix(OPERATION, "x", x.shape())?;
    let launch = Launch::begin(OPERATION, stream)?;
    let x = launch.read("x", x, [num_tokens, width])?;
    let weight = launch.read("weight", weight, [width])?;
    let out = launch.write("out", out, [num_tokens, width])?;
    let params = sys::AnabranchRmsNormParams {
        num_tokens: num_tokens as u64,
        num_heads: 1,
        width: size(OPERATION, "width", width)?,
        x: x.pointer.cast(),
        x_stride: width as u64,
        delta: std::ptr::null(),
        weight: weight.pointer.cast(),
        weight_dtype: dtype::<W>(),
        eps,
        out: out.pointer.cast(),
        out_stride: width as u64,
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; `x` is not written without a delta; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_rms_norm(&raw const params, launch.raw_stream()) })
}

/// [`rms_norm_into`] with an allocation.
///
/// # Errors
/// Those of [`rms_norm_into`], and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn rms_norm<W: Float>(stream: &Stream, x: &View<'_, bf16>, weight: &View<'_, W>, eps: f32) -> Result<Tensor<bf16>> {
    let mut out = Tensor::from_parts(stream.alloc(x.shape().len())?, x.shape());
    rms_norm_into(stream, x, weight, eps, &mut out.view_mut())?;
    Ok(out)
}

/// `residual += delta`, rounded to bf16, then `out` = the norm of that sum: a block's residual addition and the norm that
/// follows it, in one pass. All are `[T, d]`. Bound by memory: `8 T d` bytes.
///
/// # Errors
/// Those of [`rms_norm_into`].
pub fn add_rms_norm_into<W: Float>(
    stream: &Stream,
    residual: &mut ViewMut<'_, bf16>,
    delta: &View<'_, bf16>,
    weight: &View<'_, W>,
    eps: f32,
    out: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    let [num_tokens, width] = matrix(OPERATION, "residual", residual.shape())?;
    let launch = Launch::begin(OPERATION, stream)?;
    let residual = launch.write("residual", residual, [num_tokens, width])?;
    let delta = launch.read("delta", delta, [num_tokens, width])?;
    let weight = launch.read("weight", weight, [width])?;
    let out = launch.write("out", out, [num_tokens, width])?;
    let params = sys::AnabranchRmsNormParams {
        num_tokens: num_tokens as u64,
        num_heads: 1,
        width: size(OPERATION, "width", width)?,
        x: residual.pointer.cast(),
        x_stride: width as u64,
        delta: delta.pointer.cast(),
        weight: weight.pointer.cast(),
        weight_dtype: dtype::<W>(),
        eps,
        out: out.pointer.cast(),
        out_stride: width as u64,
    };
    // SAFETY: as in `rms_norm_into`; the residual is borrowed mutably.
    launch.end(unsafe { sys::anabranch_rms_norm(&raw const params, launch.raw_stream()) })
}

/// Norms heads of `x` `[T, columns]` in place, each by itself, with one `weight` `[head_dim]`: queries and keys before
/// rotation, the latent before it is cached, in the rows of whatever product made them. Other columns stay.
///
/// # Errors
/// Those of [`rms_norm_into`], and [`Error::Shape`](crate::Error::Shape) if the rows do not hold the heads.
pub fn rms_norm_heads_into<W: Float>(
    stream: &Stream,
    x: &mut ViewMut<'_, bf16>,
    heads: HeadRange,
    weight: &View<'_, W>,
    eps: f32,
) -> Result<()> {
    let [num_tokens, columns] = matrix(OPERATION, "x", x.shape())?;
    heads.check(OPERATION, "x", columns)?;
    let launch = Launch::begin(OPERATION, stream)?;
    let x = launch.write("x", x, [num_tokens, columns])?;
    let weight = launch.read("weight", weight, [heads.head_dim])?;
    let first = x.pointer.wrapping_add(heads.column);
    let params = sys::AnabranchRmsNormParams {
        num_tokens: num_tokens as u64,
        num_heads: size(OPERATION, "num_heads", heads.num_heads)?,
        width: size(OPERATION, "head_dim", heads.head_dim)?,
        x: first.cast(),
        x_stride: columns as u64,
        delta: std::ptr::null(),
        weight: weight.pointer.cast(),
        weight_dtype: dtype::<W>(),
        eps,
        out: first.cast(),
        out_stride: columns as u64,
    };
    // SAFETY: as in `rms_norm_into`; the heads lie within the rows, as just checked, and `x` is borrowed mutably.
    launch.end(unsafe { sys::anabranch_rms_norm(&raw const params, launch.raw_stream()) })
}
