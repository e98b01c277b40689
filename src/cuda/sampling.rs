//! The next token on the GPU: the most probable one, or one drawn.

use super::{
    Float, Stream, Tensor, View, ViewMut,
    checks::{dtype, matrix},
    launch::{Launch, Pointer, launched},
    sys,
};
use crate::{Error, Result, Sampling};

const ARGMAX: &str = "argmax";
const SAMPLE: &str = "sample";

/// Bytes of workspace that [`argmax_into`] needs for up to `num_rows` rows.
///
/// # Errors
/// [`Error::Launch`] if there are no logits in a row, or 2^31 of them or more.
pub fn argmax_workspace(num_rows: usize, vocab_size: usize) -> Result<usize> {
    let mut bytes = 0;
    // SAFETY: `bytes` is a live value of its type.
    let status = unsafe { sys::anabranch_argmax_workspace(num_rows as u64, vocab_size as u64, &raw mut bytes) };
    launched(ARGMAX, status)?;
    Ok(bytes as usize)
}

/// The id of the largest of each row of `logits` `[B, V]`, of equal ones the lowest, into `ids` `[B]`: what
/// [`reference::sample`](crate::reference::sample) does with [`Sampling::greedy`], except that -1 stands where that refuses the
/// row (NaN, plus infinity, all minus infinity). The workspace starts on 8 bytes. Two kernels; one if V is at most 8,192.
///
/// # Errors
/// [`Error::Shape`] if a shape does not fit, [`Error::Place`] if a tensor is elsewhere, and those of [`argmax_workspace`].
pub fn argmax_into<L: Float>(
    stream: &Stream,
    logits: &View<'_, L>,
    workspace: &mut ViewMut<'_, u8>,
    ids: &mut ViewMut<'_, i32>,
) -> Result<()> {
    let [num_rows, vocab_size] = matrix(ARGMAX, "logits", logits.shape())?;
    let bytes = argmax_workspace(num_rows, vocab_size)?;
    let launch = Launch::begin(ARGMAX, stream)?;
    let logits = launch.read("logits", logits, [num_rows, vocab_size])?;
    let ids = launch.write("ids", ids, [num_rows])?;
    let workspace_bytes = workspace.shape().len();
    let workspace = launch.workspace(workspace, bytes)?;
    let params = sys::AnabranchArgmaxParams {
        num_rows: num_rows as u64,
        vocab_size: vocab_size as u64,
        logits: logits.pointer.cast(),
        logits_dtype: dtype::<L>(),
        ids: ids.pointer,
        workspace: workspace.pointer.cast(),
        workspace_bytes: workspace_bytes as u64,
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_argmax(&raw const params, launch.raw_stream()) })
}

/// [`argmax_into`] with allocations: `[B]`.
///
/// # Errors
/// Those of [`argmax_into`], and [`Error::OutOfMemory`].
pub fn argmax<L: Float>(stream: &Stream, logits: &View<'_, L>) -> Result<Tensor<i32>> {
    let [num_rows, vocab_size] = matrix(ARGMAX, "logits", logits.shape())?;
    let bytes = argmax_workspace(num_rows, vocab_size)?;
    let mut workspace = Tensor::from_parts(stream.alloc(bytes)?, [bytes].into());
    let mut ids = Tensor::from_parts(stream.alloc(num_rows)?, [num_rows].into());
    argmax_into(stream, logits, &mut workspace.view_mut(), &mut ids.view_mut())?;
    Ok(ids)
}

/// What tokens are drawn from.
#[derive(Debug)]
pub struct SampleInput<'a, L> {
    /// `[B, V]`, bf16 or float32.
    pub logits: View<'a, L>,
    /// `[B]` in [0, 1): where in its distribution each row draws. Not read if the sampling is greedy.
    pub u: View<'a, f32>,
    /// `[B, ceil(V / 32)]`: bit `i % 32` of word `i / 32` tells whether token `i` was seen; the drawn token's is set. Needed if
    /// there is a repetition penalty.
    pub seen: Option<ViewMut<'a, u32>>,
}

/// Draws a token from each row into `ids` `[B]`, as [`reference::sample`](crate::reference::sample) specifies, but with
/// probabilities in float32, so that a `u` within about 1e-6 of the border between two tokens may draw either; -1 stands where
/// the reference refuses the row (NaN, plus infinity, all minus infinity). The same call gives the same tokens.
///
/// One kernel, one block a row: some 16 reads of a row where everything is filtered.
///
/// # Errors
/// [`Error::Shape`] if a shape does not fit, [`Error::Setting`] if there is a repetition penalty and nothing tells what was seen,
/// [`Error::Place`] if a tensor is elsewhere, [`Error::Launch`] if V is 0 or more than 2^22.
pub fn sample_into<L: Float>(
    stream: &Stream,
    sampling: &Sampling,
    input: &mut SampleInput<'_, L>,
    ids: &mut ViewMut<'_, i32>,
) -> Result<()> {
    let [num_rows, vocab_size] = matrix(SAMPLE, "logits", input.logits.shape())?;
    if input.seen.is_none() && sampling.repetition_penalty() != 1.0 {
        return Err(Error::Setting {
            operation: SAMPLE,
            setting: "seen",
            expected: format!("given with a repetition penalty of {}", sampling.repetition_penalty()),
            got: "absent".to_owned(),
        });
    }
    let launch = Launch::begin(SAMPLE, stream)?;
    let logits = launch.read("logits", &input.logits, [num_rows, vocab_size])?;
    let u = launch.read("u", &input.u, [num_rows])?;
    let seen = match &mut input.seen {
        Some(seen) => launch.write("seen", seen, [num_rows, vocab_size.div_ceil(32)])?,
        None => Pointer::null(),
    };
    let ids = launch.write("ids", ids, [num_rows])?;
    // More than there are tokens is no limit, and so is 0.
    let top_k = sampling.top_k().filter(|top_k| *top_k < vocab_size);
    let params = sys::AnabranchSampleParams {
        num_rows: num_rows as u64,
        vocab_size: vocab_size as u64,
        logits: logits.pointer.cast(),
        logits_dtype: dtype::<L>(),
        temperature: sampling.temperature(),
        top_k: top_k.map_or(0, |top_k| top_k as u32),
        top_p: sampling.top_p(),
        min_p: sampling.min_p(),
        repetition_penalty: sampling.repetition_penalty(),
        u: u.pointer,
        seen: seen.pointer,
        ids: ids.pointer,
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_sample(&raw const params, launch.raw_stream()) })
}

/// [`sample_into`] with an allocation: `[B]`.
///
/// # Errors
/// Those of [`sample_into`], and [`Error::OutOfMemory`].
pub fn sample<L: Float>(stream: &Stream, sampling: &Sampling, input: &mut SampleInput<'_, L>) -> Result<Tensor<i32>> {
    let [num_rows, _] = matrix(SAMPLE, "logits", input.logits.shape())?;
    let mut ids = Tensor::from_parts(stream.alloc(num_rows)?, [num_rows].into());
    sample_into(stream, sampling, input, &mut ids.view_mut())?;
    Ok(ids)
}
