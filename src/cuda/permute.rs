//! Permutation on the GPU: (token, slot) pairs in the order of their experts, and rows of activations in that order.

use half::bf16;

use super::{
    Stream, Tensor, View, ViewMut,
    checks::{matrix, size},
    launch::{Launch, launched},
    sys,
};
use crate::Result;

const OPERATION: &str = "permute";
const ROWS: &str = "permute_rows";

/// Stands in [`PermuteBuffers::slots`] where a row holds no pair.
pub const NO_SLOT: u32 = u32::MAX;

/// What the permutation writes. Nothing that was there is read.
#[derive(Debug)]
pub struct PermuteBuffers<'a> {
    /// `[E + 1]`: expert `e` has the permuted rows `offsets[e]..offsets[e + 1]`.
    pub expert_offsets: ViewMut<'a, u32>,
    /// `[T * K]`: for each permuted row the pair `token * K + slot` it came from; [`NO_SLOT`] from row `offsets[E]` on.
    pub slots: ViewMut<'a, u32>,
    /// `[T, K]`: for each pair its permuted row, or -1 if it goes nowhere.
    pub inverse: ViewMut<'a, i32>,
}

/// Where every pair goes: the fields of [`PermuteBuffers`], owned.
#[derive(Debug)]
pub struct PermuteOutput {
    /// `[E + 1]`: expert `e` has the permuted rows `offsets[e]..offsets[e + 1]`.
    pub expert_offsets: Tensor<u32>,
    /// `[T * K]`: for each permuted row the pair `token * K + slot` it came from; [`NO_SLOT`] from row `offsets[E]` on.
    pub slots: Tensor<u32>,
    /// `[T, K]`: for each pair its permuted row, or -1 if it goes nowhere.
    pub inverse: Tensor<i32>,
}

impl PermuteOutput {
    /// Memory for the permutation of `num_tokens` tokens, unset until [`permute_into`] writes it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), or [`Error::Driver`](crate::Error::Driver) for anything else.
    pub fn alloc(stream: &Stream, num_tokens: usize, topk: usize, num_experts: usize) -> Result<Self> {
        let pairs = num_tokens * topk;
        Ok(Self {
            expert_offsets: Tensor::from_parts(stream.alloc(num_experts + 1)?, [num_experts + 1].into()),
            slots: Tensor::from_parts(stream.alloc(pairs)?, [pairs].into()),
            inverse: Tensor::from_parts(stream.alloc(pairs)?, [num_tokens, topk].into()),
        })
    }

    /// To write.
    pub fn buffers(&mut self) -> PermuteBuffers<'_> {
        PermuteBuffers {
            expert_offsets: self.expert_offsets.view_mut(),
            slots: self.slots.view_mut(),
            inverse: self.inverse.view_mut(),
        }
    }
}

/// Bytes of workspace that [`permute_into`] needs for up to `num_tokens` tokens: at most 512 for each expert.
///
/// # Errors
/// [`Error::Launch`](crate::Error::Launch) if there are no experts or more than 1,024, `topk` is 0 or more than 32, or
/// there are 2^31 pairs or more.
pub fn permute_workspace(num_tokens: usize, topk: usize, num_experts: usize) -> Result<usize> {
    let (topk, experts) = (size(OPERATION, "topk", topk)?, size(OPERATION, "num_experts", num_experts)?);
    let mut bytes = 0;
    // SAFETY: `bytes` is a live value of its type.
    let status = unsafe { sys::anabranch_permute_workspace(num_tokens as u64, topk, experts, &raw mut bytes) };
    launched(OPERATION, status)?;
    Ok(bytes as usize)
}

/// Sorts the pairs of `topk_ids` `[T, K]` by expert, stable, as
/// [`reference::Permutation`](crate::reference::Permutation) specifies, except that an id which is no expert's goes nowhere, as
/// -1 does: a device cannot report it without being waited for. The workspace starts on 4 bytes.
///
/// One kernel up to 8,192 pairs, else two.
///
/// # Errors
/// Those of [`permute_workspace`]; [`Error::Shape`](crate::Error::Shape) if a shape does not fit,
/// [`Error::Place`](crate::Error::Place) if a tensor is elsewhere.
pub fn permute_into(
    stream: &Stream,
    topk_ids: &View<'_, i32>,
    workspace: &mut ViewMut<'_, u8>,
    output: &mut PermuteBuffers<'_>,
) -> Result<()> {
    let [num_tokens, topk] = matrix(OPERATION, "topk_ids", topk_ids.shape())?;
    let num_experts = output.expert_offsets.shape().len().saturating_sub(1);
    let bytes = permute_workspace(num_tokens, topk, num_experts)?;

    let launch = Launch::begin(OPERATION, stream)?;
    let ids = launch.read("topk_ids", topk_ids, [num_tokens, topk])?;
    let offsets = launch.write("expert_offsets", &mut output.expert_offsets, [num_experts + 1])?;
    let slots = launch.write("slots", &mut output.slots, [num_tokens * topk])?;
    let inverse = launch.write("inverse", &mut output.inverse, [num_tokens, topk])?;
    let workspace_bytes = workspace.shape().len();
    let workspace = launch.workspace(workspace, bytes)?;
    let params = sys::AnabranchPermuteParams {
        num_tokens: num_tokens as u64,
        topk: size(OPERATION, "topk", topk)?,
        num_experts: size(OPERATION, "num_experts", num_experts)?,
        topk_ids: ids.pointer,
        expert_offsets: offsets.pointer,
        slots: slots.pointer,
        inverse: inverse.pointer,
        workspace: workspace.pointer.cast(),
        workspace_bytes: workspace_bytes as u64,
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_permute(&raw const params, launch.raw_stream()) })
}

/// Sorts the pairs of `topk_ids` `[T, K]` by expert into new memory: [`permute_into`] with allocations.
///
/// # Errors
/// Those of [`permute_into`], and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn permute(stream: &Stream, topk_ids: &View<'_, i32>, num_experts: usize) -> Result<PermuteOutput> {
    let [num_tokens, topk] = matrix(OPERATION, "topk_ids", topk_ids.shape())?;
    let bytes = permute_workspace(num_tokens, topk, num_experts)?;
    let mut output = PermuteOutput::alloc(stream, num_tokens, topk, num_experts)?;
    let mut workspace = Tensor::from_parts(stream.alloc(bytes)?, [bytes].into());
    permute_into(stream, topk_ids, &mut workspace.view_mut(), &mut output.buffers())?;
    Ok(output)
}

/// Rows of `x` `[T, d]` in permuted order, `[R, d]`: a token once for every slot it uses, zeros in a row whose entry of
/// `slots` `[R]` is no token's, as [`reference::Permutation::permute`](crate::reference::Permutation::permute) specifies.
/// Bound by memory: `2 d (T + R)` bytes.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if a shape does not fit, [`Error::Place`](crate::Error::Place) if a tensor is
/// elsewhere, [`Error::Launch`](crate::Error::Launch) if d is not a multiple of 8, a row does not start on 16 bytes, or `topk` is
/// not 1 to 32.
pub fn permute_rows_into(
    stream: &Stream,
    x: &View<'_, bf16>,
    slots: &View<'_, u32>,
    topk: usize,
    out: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    let [num_tokens, hidden_size] = matrix(ROWS, "x", x.shape())?;
    let num_rows = slots.shape().len();
    let launch = Launch::begin(ROWS, stream)?;
    let x = launch.read("x", x, [num_tokens, hidden_size])?;
    let slots = launch.read("slots", slots, [num_rows])?;
    let out = launch.write("out", out, [num_rows, hidden_size])?;
    let params = sys::AnabranchPermuteRowsParams {
        num_tokens: num_tokens as u64,
        num_rows: num_rows as u64,
        topk: size(ROWS, "topk", topk)?,
        hidden_size: size(ROWS, "hidden_size", hidden_size)?,
        x: x.pointer.cast(),
        slots: slots.pointer,
        out: out.pointer.cast(),
    };
    // SAFETY: as in `permute_into`; a slot beyond the tokens is not followed.
    launch.end(unsafe { sys::anabranch_permute_rows(&raw const params, launch.raw_stream()) })
}

/// Rows in permuted order in new memory: [`permute_rows_into`] with an allocation.
///
/// # Errors
/// Those of [`permute_rows_into`], and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn permute_rows(stream: &Stream, x: &View<'_, bf16>, slots: &View<'_, u32>, topk: usize) -> Result<Tensor<bf16>> {
    let [_, hidden_size] = matrix(ROWS, "x", x.shape())?;
    let num_rows = slots.shape().len();
    let mut out = Tensor::from_parts(stream.alloc(num_rows * hidden_size)?, [num_rows, hidden_size].into());
    permute_rows_into(stream, x, slots, topk, &mut out.view_mut())?;
    Ok(out)
}
