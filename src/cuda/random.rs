//! Noise made on the GPU, and checksums of what lies in its memory: to fill and to read memory as fast as it goes.

use super::{Float, Shape, Stream, Tensor, View, ViewMut, checks::dtype, launch::Launch, sys};
use crate::Result;

/// Fills `out` with noise of mean 0 and standard deviation `scale`, about normally distributed: element `i` is
/// [`reference::random`](crate::reference::random)`(seed, i, scale)`, to the bit, rounded to bf16 where that is stored.
/// One launch, bound by writing.
///
/// # Errors
/// [`Error::Place`](crate::Error::Place) if `out` is elsewhere, [`Error::Launch`](crate::Error::Launch) if it does not
/// start on 16 bytes or CUDA refuses the launch.
pub fn random_into<O: Float>(stream: &Stream, seed: u64, scale: f32, out: &mut ViewMut<'_, O>) -> Result<()> {
    let shape = out.shape();
    let launch = Launch::begin("random", stream)?;
    let out = launch.write("out", out, shape)?;
    let params = sys::AnabranchRandomParams {
        num_elements: shape.len() as u64,
        seed,
        scale,
        out_dtype: dtype::<O>(),
        out: out.pointer.cast(),
    };
    // SAFETY: the pointer is of device memory of that many elements, checked by `launch`, borrowed mutably on the
    // stream's GPU; the guard in scope outlives the launch.
    launch.end(unsafe { sys::anabranch_random(&raw const params, launch.raw_stream()) })
}

/// [`random_into`] new memory.
///
/// # Errors
/// Those of [`random_into`], and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn random<O: Float>(stream: &Stream, shape: impl Into<Shape>, seed: u64, scale: f32) -> Result<Tensor<O>> {
    let shape = shape.into();
    let mut out = Tensor::from_parts(stream.alloc(shape.len())?, shape);
    random_into(stream, seed, scale, &mut out.view_mut())?;
    Ok(out)
}

/// The exclusive or of all words of `x` into the one of `out`, as [`reference::checksum`](crate::reference::checksum)
/// specifies: whether memory still holds what was put there, and how fast it can be read. One launch after a clear of
/// four bytes.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if `out` is not one word, [`Error::Place`](crate::Error::Place) if a tensor is
/// elsewhere, [`Error::Launch`](crate::Error::Launch) if `x` does not start on 16 bytes or CUDA refuses the launch.
pub fn checksum_into(stream: &Stream, x: &View<'_, u32>, out: &mut ViewMut<'_, u32>) -> Result<()> {
    let launch = Launch::begin("checksum", stream)?;
    let num_words = x.shape().len() as u64;
    let x = launch.read("x", x, x.shape())?;
    let out = launch.write("out", out, [1])?;
    let params = sys::AnabranchChecksumParams { num_words, x: x.pointer, out: out.pointer };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the
    // stream's GPU; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_checksum(&raw const params, launch.raw_stream()) })
}

/// The exclusive or of all words of `x`, in new memory: [`checksum_into`] with an allocation.
///
/// # Errors
/// Those of [`checksum_into`], and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn checksum(stream: &Stream, x: &View<'_, u32>) -> Result<Tensor<u32>> {
    let mut out = Tensor::from_parts(stream.alloc(1)?, [1].into());
    checksum_into(stream, x, &mut out.view_mut())?;
    Ok(out)
}
