//! Products of rows with their experts' weights, in one launch.

use half::bf16;

use super::{
    Element, Stream, Tensor, View, ViewMut,
    launch::{Launch, Pointer},
    sys,
};
use crate::{Error, MAX_EXPERTS, MAX_TOPK, Result};

const OPERATION: &str = "grouped_gemm";

/// What becomes of a product before it is rounded and stored, in float32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Epilogue {
    /// Nothing, or the bias added.
    #[default]
    Linear,
    /// `max(x, 0)`, after the bias where there is one.
    Relu,
    /// The exact GELU, after the bias where there is one.
    Gelu,
    /// `silu(gate) * up`, where the weights, and the bias where there is one, hold the gate's rows, then as many of up.
    SwiGlu,
}

/// Rows of x by rows of weights that one block multiplies at a time. It changes the time of a call and no bit of its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Tile {
    /// Chosen from the shape and the GPU.
    #[default]
    Auto,
    /// 16 x 64: few rows an expert, weights streamed once.
    Rows16,
    /// 32 x 128.
    Rows32,
    /// 64 x 128.
    Rows64,
    /// 128 x 128: many rows, two blocks a multiprocessor.
    Rows128,
    /// 128 x 256: many rows. Needs 193 KiB of shared memory a block (8.0 has 163, 9.0 227).
    Rows128Wide,
}

/// What results are stored as: bf16 or f32.
pub trait GemmOutput: Element + private::Sealed {}

impl GemmOutput for bf16 {}
impl GemmOutput for f32 {}

pub(super) mod private {
    use super::{bf16, sys::AnabranchDtype};

    pub trait Sealed {
        const DTYPE: AnabranchDtype;
    }

    impl Sealed for bf16 {
        const DTYPE: AnabranchDtype = AnabranchDtype::ANABRANCH_DTYPE_BF16;
    }

    impl Sealed for f32 {
        const DTYPE: AnabranchDtype = AnabranchDtype::ANABRANCH_DTYPE_F32;
    }
}

/// Where the rows of x for each row of the result are.
#[derive(Debug)]
pub struct Gather<'a> {
    /// `[R]`: for each permuted row the pair `token * K + slot` it came from. Entries past the last expert's are not read.
    pub slots: View<'a, u32>,
    /// K.
    pub topk: usize,
}

/// What [`grouped_gemm_into`] reads. d is the inner dimension, n the result's width: each a multiple of 8.
#[derive(Debug)]
pub struct GroupedGemmInput<'a> {
    /// `[T, d]` where rows are gathered, else `[R, d]` in permuted order.
    pub x: View<'a, bf16>,
    /// `[E, n, d]`, or `[E, 2n, d]` with [`Epilogue::SwiGlu`]: as Transformers holds `gate_up_proj` and `down_proj`.
    pub weights: View<'a, bf16>,
    /// `[E, n]`, or `[E, 2n]` with [`Epilogue::SwiGlu`].
    pub bias: Option<View<'a, f32>>,
    /// `[E + 1]`: expert e has the permuted rows `offsets[e]..offsets[e + 1]`. Ascending, and R at most.
    pub expert_offsets: View<'a, u32>,
    /// Absent where x is in permuted order already.
    pub gather: Option<Gather<'a>>,
    /// Done to every product.
    pub epilogue: Epilogue,
    /// [`Tile::Auto`] but to measure or test.
    pub tile: Tile,
}

impl GroupedGemmInput<'_> {
    /// R: the most rows that the result can have.
    fn rows(&self) -> Result<usize> {
        let rows = match &self.gather {
            Some(gather) => gather.slots.shape().len(),
            None => matrix(OPERATION, "x", &self.x)?[0],
        };
        Ok(rows)
    }
}

/// Multiplies every row with its expert's weights, `y[r] = epilogue(x[source(r)] W_e^T)` for `offsets[e] <= r < offsets[e + 1]`, as
/// [`reference::grouped_gemm`](crate::reference::grouped_gemm) specifies for each of its two products. Sums are float32, in an order
/// that depends on d alone: a row's bits do not hang on the other rows of the batch.
///
/// `y` is `[R, n]`; rows from `offsets[E]` on are left as they are. One launch, sized by R without knowing the counts; offsets or slots
/// that break their contract give wrong values, never accesses out of bounds. It costs
/// `2 R d n` FLOP (twice that with [`Epilogue::SwiGlu`]) or one read of the weights of all experts hit, whichever takes longer.
///
/// # Errors
/// [`Error::Shape`] if a shape does not fit, [`Error::Setting`] if a size is out of range, [`Error::Place`]
/// if a tensor is elsewhere, [`Error::Launch`] if a pointer is not on 16 bytes, the GPU lacks the shared memory for the tile that
/// was asked for, or CUDA refuses the launch.
pub fn grouped_gemm_into<O: GemmOutput>(
    stream: &Stream,
    input: &GroupedGemmInput<'_>,
    y: &mut ViewMut<'_, O>,
) -> Result<()> {
    let sizes = Sizes::of(input)?;
    let [num_tokens, rows, experts] = [sizes.num_tokens, sizes.rows, sizes.experts];
    let [depth, columns] = [sizes.depth, sizes.columns];
    let launch = Launch::begin(OPERATION, stream)?;
    let x = launch.read("x", &input.x, [num_tokens, depth])?;
    let weights = launch.read("weights", &input.weights, [experts, weight_rows(input.epilogue, columns), depth])?;
    let bias = match &input.bias {
        Some(bias) => launch.read("bias", bias, [experts, weight_rows(input.epilogue, columns)])?,
        None => Pointer::null(),
    };
    let offsets = launch.read("expert_offsets", &input.expert_offsets, [experts + 1])?;
    let (slots, topk) = match &input.gather {
        Some(gather) => (launch.read("slots", &gather.slots, [rows])?, gather.topk),
        None => (Pointer::null(), 0),
    };
    let y = launch.write("y", y, [rows, columns])?;
    let params = sys::AnabranchGroupedGemmParams {
        num_rows: rows as u64,
        num_tokens: num_tokens as u64,
        num_experts: experts as u32,
        topk: topk as u32,
        in_features: depth as u32,
        out_features: columns as u32,
        epilogue: epilogue(input.epilogue),
        tile: tile(input.tile),
        y_dtype: O::DTYPE,
        x: x.pointer.cast(),
        weights: weights.pointer.cast(),
        bias: bias.pointer,
        expert_offsets: offsets.pointer,
        row_slots: slots.pointer,
        y: y.pointer.cast(),
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; what is written is borrowed mutably; the guards in scope outlive the launch. The kernel bounds offsets by R
    // and slots by T itself.
    launch.end(unsafe { sys::anabranch_grouped_gemm(&raw const params, launch.raw_stream()) })
}

/// [`grouped_gemm_into`] new memory; rows from `offsets[E]` on are zeros.
///
/// # Errors
/// Those of [`grouped_gemm_into`], and [`Error::OutOfMemory`].
pub fn grouped_gemm<O: GemmOutput>(stream: &Stream, input: &GroupedGemmInput<'_>) -> Result<Tensor<O>> {
    let sizes = Sizes::of(input)?;
    let mut y = stream.zeros([sizes.rows, sizes.columns])?;
    grouped_gemm_into(stream, input, &mut y.view_mut())?;
    Ok(y)
}

struct Sizes {
    num_tokens: usize,
    rows: usize,
    experts: usize,
    depth: usize,
    columns: usize,
}

impl Sizes {
    fn of(input: &GroupedGemmInput<'_>) -> Result<Self> {
        let [num_tokens, depth] = matrix(OPERATION, "x", &input.x)?;
        let got = input.weights.shape();
        let &[experts, weight_rows, _] = got.sizes() else {
            let expected = format!("[experts, out, {depth}]");
            return Err(Error::Shape { operation: OPERATION, argument: "weights", expected, got: got.to_string() });
        };
        let columns = columns(OPERATION, input.epilogue, weight_rows)?;
        check_width(OPERATION, "in features", depth)?;
        within(OPERATION, "number of experts", experts, 1, MAX_EXPERTS)?;
        let rows = input.rows()?;
        if let Some(gather) = &input.gather {
            within(OPERATION, "topk", gather.topk, 1, MAX_TOPK)?;
        }
        check_rows(OPERATION, rows)?;
        check_rows(OPERATION, num_tokens)?;
        Ok(Self { num_tokens, rows, experts, depth, columns })
    }
}

/// Rows and columns of what must be a matrix.
pub(super) fn matrix<T: Element>(
    operation: &'static str,
    argument: &'static str,
    view: &View<'_, T>,
) -> Result<[usize; 2]> {
    match view.shape().sizes() {
        &[rows, columns] => Ok([rows, columns]),
        _ => Err(Error::Shape {
            operation,
            argument,
            expected: "[rows, columns]".to_owned(),
            got: view.shape().to_string(),
        }),
    }
}

/// The result's width.
pub(super) fn columns(operation: &'static str, epilogue: Epilogue, weight_rows: usize) -> Result<usize> {
    if epilogue != Epilogue::SwiGlu {
        check_width(operation, "out features", weight_rows)?;
        return Ok(weight_rows);
    }
    if !weight_rows.is_multiple_of(2) {
        let expected = "gate rows and as many of up".to_owned();
        return Err(Error::Setting { operation, setting: "weight rows", expected, got: weight_rows.to_string() });
    }
    check_width(operation, "out features", weight_rows / 2)?;
    Ok(weight_rows / 2)
}

/// Rows of an expert's weights.
pub(super) fn weight_rows(epilogue: Epilogue, columns: usize) -> usize {
    if epilogue == Epilogue::SwiGlu { 2 * columns } else { columns }
}

pub(super) fn check_width(operation: &'static str, setting: &'static str, width: usize) -> Result<()> {
    if width.is_multiple_of(8) && (8..=1 << 30).contains(&width) {
        return Ok(());
    }
    let expected = "a multiple of 8 from 8 to 2^30".to_owned();
    Err(Error::Setting { operation, setting, expected, got: width.to_string() })
}

pub(super) fn check_rows(operation: &'static str, rows: usize) -> Result<()> {
    within(operation, "number of rows", rows, 0, i32::MAX as usize)
}

fn within(operation: &'static str, setting: &'static str, value: usize, low: usize, high: usize) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::Setting { operation, setting, expected: format!("from {low} to {high}"), got: value.to_string() })
}

pub(super) fn epilogue(epilogue: Epilogue) -> sys::AnabranchEpilogue {
    match epilogue {
        Epilogue::Linear => sys::AnabranchEpilogue::ANABRANCH_EPILOGUE_LINEAR,
        Epilogue::Relu => sys::AnabranchEpilogue::ANABRANCH_EPILOGUE_RELU,
        Epilogue::Gelu => sys::AnabranchEpilogue::ANABRANCH_EPILOGUE_GELU,
        Epilogue::SwiGlu => sys::AnabranchEpilogue::ANABRANCH_EPILOGUE_SWIGLU,
    }
}

pub(super) fn tile(tile: Tile) -> sys::AnabranchTile {
    match tile {
        Tile::Auto => sys::AnabranchTile::ANABRANCH_TILE_AUTO,
        Tile::Rows16 => sys::AnabranchTile::ANABRANCH_TILE_16X64,
        Tile::Rows32 => sys::AnabranchTile::ANABRANCH_TILE_32X128,
        Tile::Rows64 => sys::AnabranchTile::ANABRANCH_TILE_64X128,
        Tile::Rows128 => sys::AnabranchTile::ANABRANCH_TILE_128X128,
        Tile::Rows128Wide => sys::AnabranchTile::ANABRANCH_TILE_128X256,
    }
}
