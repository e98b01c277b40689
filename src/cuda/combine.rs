//! Combine on the GPU: the weighted sum of what a token's experts answered.

use half::bf16;

use super::{
    Float, Stream, Tensor, View, ViewMut,
    checks::{dtype, matrix, size},
    launch::{Launch, Pointer},
    sys,
};
use crate::{Error, Result};

const OPERATION: &str = "combine";

/// What combine reads.
#[derive(Debug)]
pub struct CombineInput<'a> {
    /// `[R, d]`: the experts' answers in permuted order.
    pub y: View<'a, bf16>,
    /// `[T, K]`: the permuted row of each pair; one that is no row of `y`, such as -1, adds nothing, whatever its weight.
    pub inverse: View<'a, i32>,
    /// `[T, K]`.
    pub topk_weights: View<'a, f32>,
    /// `[T, d]`: the shared experts' answers, added last.
    pub shared: Option<View<'a, bf16>>,
    /// `[T]`: logits of the shared experts' gate, whose sigmoid scales their answer (Qwen2-MoE's `shared_expert_gate`).
    pub shared_gate: Option<View<'a, f32>>,
}

/// `out[t] = sum_k topk_weights[t, k] * y[inverse[t, k]] + sigmoid(shared_gate[t]) * shared[t]` into `out` `[T, d]`, bf16 or
/// float32, as [`reference::combine`](crate::reference::combine) specifies: float32 sums, k ascending, shared experts last, one
/// rounding. Bound by memory: `2 d (T K + T)` bytes and as much as `out` for shared experts.
///
/// # Errors
/// [`Error::Shape`] if a shape does not fit, [`Error::Setting`] if there is a shared gate without shared experts, [`Error::Place`]
/// if a tensor is elsewhere, [`Error::Launch`] if d is not a multiple of 8, a row does not start on 16 bytes, or K is not 1 to 32.
pub fn combine_into<O: Float>(stream: &Stream, input: &CombineInput<'_>, out: &mut ViewMut<'_, O>) -> Result<()> {
    let [num_tokens, topk] = matrix(OPERATION, "inverse", input.inverse.shape())?;
    let [num_rows, hidden_size] = matrix(OPERATION, "y", input.y.shape())?;
    if input.shared_gate.is_some() && input.shared.is_none() {
        return Err(Error::Setting {
            operation: OPERATION,
            setting: "shared_gate",
            expected: "absent without shared experts".to_owned(),
            got: "given".to_owned(),
        });
    }
    let launch = Launch::begin(OPERATION, stream)?;
    let y = launch.read("y", &input.y, [num_rows, hidden_size])?;
    let inverse = launch.read("inverse", &input.inverse, [num_tokens, topk])?;
    let weights = launch.read("topk_weights", &input.topk_weights, [num_tokens, topk])?;
    let shared = match &input.shared {
        Some(shared) => launch.read("shared", shared, [num_tokens, hidden_size])?,
        None => Pointer::null(),
    };
    let shared_gate = match &input.shared_gate {
        Some(gate) => launch.read("shared_gate", gate, [num_tokens])?,
        None => Pointer::null(),
    };
    let out = launch.write("out", out, [num_tokens, hidden_size])?;
    let params = sys::AnabranchCombineParams {
        num_tokens: num_tokens as u64,
        num_rows: num_rows as u64,
        topk: size(OPERATION, "topk", topk)?,
        hidden_size: size(OPERATION, "hidden_size", hidden_size)?,
        y: y.pointer.cast(),
        inverse: inverse.pointer,
        topk_weights: weights.pointer,
        shared: shared.pointer.cast(),
        shared_gate: shared_gate.pointer,
        out: out.pointer.cast(),
        out_dtype: dtype::<O>(),
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; rows beyond `y` are not followed; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_combine(&raw const params, launch.raw_stream()) })
}

/// [`combine_into`] with an allocation: `[T, d]`.
///
/// # Errors
/// Those of [`combine_into`], and [`Error::OutOfMemory`].
pub fn combine<O: Float>(stream: &Stream, input: &CombineInput<'_>) -> Result<Tensor<O>> {
    let [num_tokens, _] = matrix(OPERATION, "inverse", input.inverse.shape())?;
    let [_, hidden_size] = matrix(OPERATION, "y", input.y.shape())?;
    let mut out = Tensor::from_parts(stream.alloc(num_tokens * hidden_size)?, [num_tokens, hidden_size].into());
    combine_into(stream, input, &mut out.view_mut())?;
    Ok(out)
}
