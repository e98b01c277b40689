//! The next token on the GPU: the most probable one, or one drawn.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};

use super::{
    Element, Float, Stream, Tensor, View, ViewMut,
    checks::{dtype, matrix},
    launch::{Launch, Pointer, launched},
    sys,
    tensor::private::Sealed,
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

/// How one row is drawn from, as the GPU reads it: settings, and where in the distribution to draw.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub struct SampleRow(sys::AnabranchSampleRow);

impl SampleRow {
    /// The arguments of [`reference::sample`](crate::reference::sample), but for what was seen.
    ///
    /// # Errors
    /// [`Error::Setting`] if `u` is not in [0, 1).
    pub fn new(sampling: &Sampling, u: f64) -> Result<Self> {
        if !(0.0..1.0).contains(&u) {
            let (expected, got) = ("at least 0 and below 1".to_owned(), u.to_string());
            return Err(Error::Setting { operation: SAMPLE, setting: "u", expected, got });
        }
        Ok(Self::of(sampling, u))
    }

    /// The most probable token, always: [`Sampling::greedy`].
    pub fn greedy() -> Self {
        Self::of(&Sampling::greedy(), 0.0)
    }

    fn of(sampling: &Sampling, u: f64) -> Self {
        Self(sys::AnabranchSampleRow {
            u,
            temperature: sampling.temperature(),
            // More than can be counted is no limit.
            top_k: sampling.top_k().and_then(|top_k| u32::try_from(top_k).ok()).unwrap_or(0),
            top_p: sampling.top_p(),
            min_p: sampling.min_p(),
            repetition_penalty: sampling.repetition_penalty(),
            unused: 0,
        })
    }
}

impl Default for SampleRow {
    fn default() -> Self {
        Self::greedy()
    }
}

impl Sealed for SampleRow {}
// SAFETY: numbers side by side without a gap, laid out as the kernel has them: one header makes both.
unsafe impl DeviceRepr for SampleRow {}
// SAFETY: zeros are values of all its numbers. They are no settings, which the kernel finds out: such a row's token is -1.
unsafe impl ValidAsZeroBits for SampleRow {}
impl Element for SampleRow {}

/// What tokens are drawn from.
#[derive(Debug)]
pub struct SampleInput<'a, L> {
    /// `[B, V]`, bf16 or float32.
    pub logits: View<'a, L>,
    /// `[B]`. A captured call draws by whatever lies there when it is replayed.
    pub rows: View<'a, SampleRow>,
    /// `[B, ceil(V / 32)]`: bit `i % 32` of word `i / 32` tells whether token `i` was seen; the drawn token's is set. Needed if a
    /// row has a repetition penalty.
    pub seen: Option<ViewMut<'a, u32>>,
}

/// Draws a token from each row of logits into `ids` `[B]`, as [`reference::sample`](crate::reference::sample) specifies, but with
/// probabilities in float32, so that a `u` within about 1e-6 of the border between two tokens may draw either; -1 stands where
/// the reference refuses the row (NaN, plus infinity, all minus infinity), where a row has a repetition penalty and nothing tells
/// what was seen, and where `rows` was left at zero. The same call gives the same tokens, and a row's token depends on that row alone.
///
/// One kernel, one block a row: some 16 reads of a row where everything is filtered.
///
/// # Errors
/// [`Error::Shape`] if a shape does not fit, [`Error::Place`] if a tensor is elsewhere, [`Error::Launch`] if V is 0 or more than 2^22.
pub fn sample_into<L: Float>(
    stream: &Stream,
    input: &mut SampleInput<'_, L>,
    ids: &mut ViewMut<'_, i32>,
) -> Result<()> {
    let [num_rows, vocab_size] = matrix(SAMPLE, "logits", input.logits.shape())?;
    let launch = Launch::begin(SAMPLE, stream)?;
    let logits = launch.read("logits", &input.logits, [num_rows, vocab_size])?;
    let rows = launch.read("rows", &input.rows, [num_rows])?;
    let seen = match &mut input.seen {
        Some(seen) => launch.write("seen", seen, [num_rows, vocab_size.div_ceil(32)])?,
        None => Pointer::null(),
    };
    let ids = launch.write("ids", ids, [num_rows])?;
    let params = sys::AnabranchSampleParams {
        num_rows: num_rows as u64,
        vocab_size: vocab_size as u64,
        logits: logits.pointer.cast(),
        logits_dtype: dtype::<L>(),
        rows: rows.pointer.cast(),
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
pub fn sample<L: Float>(stream: &Stream, input: &mut SampleInput<'_, L>) -> Result<Tensor<i32>> {
    let [num_rows, _] = matrix(SAMPLE, "logits", input.logits.shape())?;
    let mut ids = Tensor::from_parts(stream.alloc(num_rows)?, [num_rows].into());
    sample_into(stream, input, &mut ids.view_mut())?;
    Ok(ids)
}
