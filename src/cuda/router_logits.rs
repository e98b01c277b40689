//! The gate product on the GPU: what a router judges by.

use half::bf16;

use super::{
    Stream, Tensor, View, ViewMut,
    checks::{matrix, size},
    grouped_gemm::{check_rows, check_width},
    launch::{Launch, Pointer},
    sys,
};
use crate::{Error, MAX_EXPERTS, Result};

const OPERATION: &str = "router_logits";

/// What [`router_logits_into`] reads.
#[derive(Debug)]
pub struct RouterLogitsInput<'a> {
    /// `[T, d]`, d a multiple of 8.
    pub x: View<'a, bf16>,
    /// `[E, d]`: the router's gate.
    pub gate: View<'a, bf16>,
    /// `[E]`: the gate's own bias, part of the logits.
    pub bias: Option<View<'a, f32>>,
}

impl RouterLogitsInput<'_> {
    /// T, E, d.
    fn sizes(&self) -> Result<[usize; 3]> {
        let [num_tokens, hidden_size] = matrix(OPERATION, "x", self.x.shape())?;
        let [experts, _] = matrix(OPERATION, "gate", self.gate.shape())?;
        check_width(OPERATION, "hidden_size", hidden_size)?;
        check_rows(OPERATION, num_tokens)?;
        if (1..=MAX_EXPERTS).contains(&experts) {
            return Ok([num_tokens, experts, hidden_size]);
        }
        Err(Error::Setting {
            operation: OPERATION,
            setting: "number of experts",
            expected: format!("from 1 to {MAX_EXPERTS}"),
            got: experts.to_string(),
        })
    }
}

/// `logits[t, e] = sum_i x[t, i] gate[e, i] + bias[e]` into `logits` `[T, E]`, summed and stored in float32, as
/// [`reference::linear`](crate::reference::linear) specifies. One launch; up to 64 tokens the blocks are spread so that
/// many multiprocessors read the gate at once. A token's logits do not depend on the other tokens, but the order of a
/// sum is another with few tokens than with many.
///
/// It costs `2 T E d` FLOP or one read of the gate, `2 E d` bytes, whichever takes longer.
///
/// # Errors
/// [`Error::Shape`] if a shape does not fit, [`Error::Setting`] if a size is out of range, [`Error::Place`] if a tensor
/// is elsewhere, [`Error::Launch`] if a row does not start on 16 bytes or CUDA refuses the launch.
pub fn router_logits_into(stream: &Stream, input: &RouterLogitsInput<'_>, logits: &mut ViewMut<'_, f32>) -> Result<()> {
    let [num_tokens, experts, hidden_size] = input.sizes()?;
    let launch = Launch::begin(OPERATION, stream)?;
    let x = launch.read("x", &input.x, [num_tokens, hidden_size])?;
    let gate = launch.read("gate", &input.gate, [experts, hidden_size])?;
    let bias = match &input.bias {
        Some(bias) => launch.read("bias", bias, [experts])?,
        None => Pointer::null(),
    };
    let logits = launch.write("logits", logits, [num_tokens, experts])?;
    let params = sys::AnabranchRouterLogitsParams {
        num_tokens: num_tokens as u64,
        num_experts: size(OPERATION, "number of experts", experts)?,
        hidden_size: size(OPERATION, "hidden_size", hidden_size)?,
        x: x.pointer.cast(),
        gate: gate.pointer.cast(),
        bias: bias.pointer,
        logits: logits.pointer,
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the
    // stream's GPU; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_router_logits(&raw const params, launch.raw_stream()) })
}

/// [`router_logits_into`] new memory, `[T, E]`.
///
/// # Errors
/// Those of [`router_logits_into`], and [`Error::OutOfMemory`].
pub fn router_logits(stream: &Stream, input: &RouterLogitsInput<'_>) -> Result<Tensor<f32>> {
    let [num_tokens, experts, _] = input.sizes()?;
    let mut logits = Tensor::from_parts(stream.alloc(num_tokens * experts)?, [num_tokens, experts].into());
    router_logits_into(stream, input, &mut logits.view_mut())?;
    Ok(logits)
}
