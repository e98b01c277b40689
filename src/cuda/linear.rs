//! Dense products: for few tokens kernels that stream the weights, for many cuBLASLt where a stream has it, else the grouped
//! product with one expert that has every row.

use half::bf16;

use super::{
    Epilogue, GemmOutput, Stream, Tensor, Tile, View, ViewMut,
    cublaslt::CublasLt,
    grouped_gemm::{check_rows, check_width, columns, epilogue, matrix, tile, weight_rows},
    launch::{Launch, Pointer, launched},
    sys,
};
use crate::{Error, Result};

const OPERATION: &str = "linear";
const NORM_OPERATION: &str = "norm_linear";

/// From so many tokens on cuBLASLt is worth it: below, a product takes as long as its weights take to be read, whoever does it. With 64 it takes
/// 6% off a decode step of LLaMA-2-7B on an H200, with 16 a product alone takes as long; between them nothing was measured.
pub const CUBLASLT_FROM_TOKENS: usize = 32;

/// What [`linear_into`] reads.
#[derive(Debug)]
pub struct LinearInput<'a> {
    /// `[T, in]`; the width a multiple of 8.
    pub x: View<'a, bf16>,
    /// `[out, in]`, or `[2 out, in]` with [`Epilogue::SwiGlu`]; out a multiple of 8.
    pub weight: View<'a, bf16>,
    /// `[out]`, or `[2 out]` with [`Epilogue::SwiGlu`].
    pub bias: Option<View<'a, f32>>,
    /// Done to every product.
    pub epilogue: Epilogue,
    /// [`Tile::Auto`] but to measure or test: any other is the kernels' own.
    pub tile: Tile,
}

/// Who multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Own,
    CublasLt,
}

impl LinearInput<'_> {
    /// T, in, out.
    fn sizes(&self) -> Result<[usize; 3]> {
        let [num_tokens, inner] = matrix(OPERATION, "x", &self.x)?;
        let [weight_rows, _] = matrix(OPERATION, "weight", &self.weight)?;
        check_width(OPERATION, "in features", inner)?;
        check_rows(OPERATION, num_tokens)?;
        Ok([num_tokens, inner, columns(OPERATION, self.epilogue, weight_rows)?])
    }
}

/// cuBLASLt for plain products of enough tokens, where the stream has it (`cublaslt`: from so many on). It knows neither SwiGLU nor
/// the exact GELU, and biases only of the result's own type, so that everything done to a product is the kernels' own.
fn way(num_tokens: usize, epilogue: Epilogue, bias: bool, tile: Tile, cublaslt: Option<usize>) -> Way {
    let plain = epilogue == Epilogue::Linear && !bias;
    match cublaslt {
        Some(least) if plain && tile == Tile::Auto && num_tokens >= least.max(1) => Way::CublasLt,
        _ => Way::Own,
    }
}

/// `y[T, out] = epilogue(x W^T + b)`, as [`reference::linear`](crate::reference::linear) specifies, summed in float32. The same call
/// gives the same bits. `2 T in out` FLOP or one read of the weight, whichever takes longer.
///
/// The kernels' own product is one launch, and sums in an order that depends on the sizes and the GPU. Few tokens have kernels of their own, with [`Tile::Auto`]
/// and the epilogue [`Epilogue::Linear`], or [`Epilogue::SwiGlu`] without a bias: on Hopper up to 64, elsewhere up to 4, and up to 8 where
/// the weight has less than 32 MiB (fewer where they are very wide). They begin to read the weight early on a stream
/// [with settled weights](Stream::with_settled_weights).
///
/// Where the stream has cuBLASLt ([`Stream::enable_cublaslt`]), that computes what has neither bias nor epilogue, with [`Tile::Auto`],
/// from the number of tokens on that the stream was given, except for shapes that it has no repeatable algorithm for: in one launch or
/// two, in an order that depends on all three sizes and on the library's release.
///
/// # Errors
/// As [`grouped_gemm_into`](super::grouped_gemm_into); [`Error::Launch`] also with what cuBLASLt reports.
pub fn linear_into<O: GemmOutput>(stream: &Stream, input: &LinearInput<'_>, y: &mut ViewMut<'_, O>) -> Result<()> {
    let [num_tokens, inner, out] = input.sizes()?;
    let launch = Launch::begin(OPERATION, stream)?;
    let x = launch.read("x", &input.x, [num_tokens, inner])?;
    let weight = launch.read("weight", &input.weight, [weight_rows(input.epilogue, out), inner])?;
    let bias = match &input.bias {
        Some(bias) => launch.read("bias", bias, [weight_rows(input.epilogue, out)])?,
        None => Pointer::null(),
    };
    let y = launch.write("y", y, [num_tokens, out])?;
    let cublaslt = stream.cublaslt();
    let least_tokens = cublaslt.map(CublasLt::least_tokens);
    let way = way(num_tokens, input.epilogue, input.bias.is_some(), input.tile, least_tokens);
    if let (Some(cublaslt), Way::CublasLt) = (cublaslt, way) {
        // SAFETY: the pointers are of device memory of these shapes, checked by `launch`, on this stream's GPU; what is written is
        // borrowed mutably; the guards in scope outlive the launch.
        if unsafe { cublaslt.multiply(launch, [num_tokens, inner, out], &x, &weight, &y) }? {
            return launch.end(sys::AnabranchStatus::ANABRANCH_STATUS_OK);
        }
    }
    if takes_few(input.epilogue, input.bias.is_some(), false, num_tokens, [inner, out])? && input.tile == Tile::Auto {
        let params = few(stream, [num_tokens, inner, out], input.epilogue, (&x, &weight, &bias, &y));
        // SAFETY: as below.
        return launch.end(unsafe { sys::anabranch_linear(&raw const params, launch.raw_stream()) });
    }
    let params = sys::AnabranchGroupedGemmParams {
        num_rows: num_tokens as u64,
        num_tokens: num_tokens as u64,
        num_experts: 1,
        topk: 0,
        in_features: inner as u32,
        out_features: out as u32,
        epilogue: epilogue(input.epilogue),
        tile: tile(input.tile),
        y_dtype: O::DTYPE,
        x: x.pointer.cast(),
        weights: weight.pointer.cast(),
        bias: bias.pointer,
        expert_offsets: std::ptr::null(),
        row_slots: std::ptr::null(),
        y: y.pointer.cast(),
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_grouped_gemm(&raw const params, launch.raw_stream()) })
}

/// Whether a kernel for few tokens does this, after a norm or without. A device must be current.
fn takes_few(epilogue: Epilogue, bias: bool, norms: bool, num_tokens: usize, [inner, out]: [usize; 2]) -> Result<bool> {
    let known = match epilogue {
        Epilogue::Linear => true,
        Epilogue::SwiGlu => !bias,
        Epilogue::Relu | Epilogue::Gelu => false,
    };
    if !known {
        return Ok(false);
    }
    let mut takes = 0;
    let rows = weight_rows(epilogue, out) as u64;
    // SAFETY: `takes` is a live value of its type.
    let status =
        unsafe { sys::anabranch_linear_takes(num_tokens as u64, inner as u32, rows, u32::from(norms), &raw mut takes) };
    launched(OPERATION, status)?;
    Ok(takes != 0)
}

/// The kernel for few tokens on x, weight, bias and y, without a norm.
fn few<O: GemmOutput>(
    stream: &Stream,
    [num_tokens, inner, out]: [usize; 3],
    done: Epilogue,
    (x, weight, bias, y): (&Pointer<'_, bf16>, &Pointer<'_, bf16>, &Pointer<'_, f32>, &Pointer<'_, O>),
) -> sys::AnabranchLinearParams {
    sys::AnabranchLinearParams {
        num_tokens: num_tokens as u64,
        in_features: inner as u32,
        out_features: out as u32,
        epilogue: epilogue(done),
        y_dtype: O::DTYPE,
        x: x.pointer.cast(),
        weights: weight.pointer.cast(),
        bias: bias.pointer,
        y: y.pointer.cast(),
        norm_weight: std::ptr::null(),
        norm_eps: 0.0,
        delta: std::ptr::null(),
        sum: std::ptr::null_mut(),
        weights_settled: u32::from(stream.settled_weights()),
    }
}

/// What [`norm_linear_into`] reads.
#[derive(Debug)]
pub struct NormLinearInput<'a> {
    /// `[T, in]`: the residual stream.
    pub x: View<'a, bf16>,
    /// `[T, in]`: what is added to it first.
    pub delta: Option<View<'a, bf16>>,
    /// `[in]`.
    pub norm_weight: View<'a, f32>,
    /// Of the norm.
    pub norm_eps: f32,
    /// As in [`LinearInput`].
    pub weight: View<'a, bf16>,
    /// As in [`LinearInput`].
    pub bias: Option<View<'a, f32>>,
    /// Done to every product.
    pub epilogue: Epilogue,
}

/// Whether [`norm_linear_into`] takes so many tokens of width `inner` to `out` columns: up to 4, up to 8 where the weight has less
/// than 32 MiB, fewer where they are very wide, with the epilogue [`Epilogue::Linear`], or [`Epilogue::SwiGlu`] without a bias.
///
/// # Errors
/// [`Error::Driver`] or [`Error::Launch`] if the GPU does not answer.
pub fn norm_linear_takes(
    stream: &Stream,
    num_tokens: usize,
    [inner, out]: [usize; 2],
    epilogue: Epilogue,
    bias: bool,
) -> Result<bool> {
    Launch::bind(NORM_OPERATION, stream.device())?;
    takes_few(epilogue, bias, true, num_tokens, [inner, out])
}

/// `y[T, out] = epilogue(norm(x + delta) W^T + b)` of a few tokens, and `sum = x + delta`, rounded to bf16: a block's residual
/// addition, norm and first product in one launch, as [`add_rms_norm_into`](super::add_rms_norm_into) and [`linear_into`] do in
/// two, up to the order of the norm's sum. One read of the weight; every multiprocessor makes the norm for itself meanwhile.
///
/// # Errors
/// [`Error::Setting`] for what [`norm_linear_takes`] does not take; else those of [`linear_into`].
pub fn norm_linear_into<O: GemmOutput>(
    stream: &Stream,
    input: &NormLinearInput<'_>,
    sum: Option<&mut ViewMut<'_, bf16>>,
    y: &mut ViewMut<'_, O>,
) -> Result<()> {
    let [num_tokens, inner] = matrix(NORM_OPERATION, "x", &input.x)?;
    let [rows, _] = matrix(NORM_OPERATION, "weight", &input.weight)?;
    check_width(NORM_OPERATION, "in features", inner)?;
    let out = columns(NORM_OPERATION, input.epilogue, rows)?;
    let launch = Launch::begin(NORM_OPERATION, stream)?;
    if !takes_few(input.epilogue, input.bias.is_some(), true, num_tokens, [inner, out])? {
        return Err(Error::Setting {
            operation: NORM_OPERATION,
            setting: "number of tokens, epilogue and bias",
            expected: "what norm_linear_takes: rms_norm and linear do the same for any".to_owned(),
            got: format!("{num_tokens} tokens of {inner}, {:?}", input.epilogue),
        });
    }
    let x = launch.read("x", &input.x, [num_tokens, inner])?;
    let delta = match &input.delta {
        Some(delta) => launch.read("delta", delta, [num_tokens, inner])?,
        None => Pointer::null(),
    };
    let norm_weight = launch.read("norm_weight", &input.norm_weight, [inner])?;
    let weight = launch.read("weight", &input.weight, [rows, inner])?;
    let bias = match &input.bias {
        Some(bias) => launch.read("bias", bias, [rows])?,
        None => Pointer::null(),
    };
    let sum = match sum {
        Some(sum) => launch.write("sum", sum, [num_tokens, inner])?,
        None => Pointer::null(),
    };
    let y = launch.write("y", y, [num_tokens, out])?;
    let params = sys::AnabranchLinearParams {
        norm_weight: norm_weight.pointer,
        norm_eps: input.norm_eps,
        delta: delta.pointer.cast(),
        sum: sum.pointer.cast(),
        ..few(stream, [num_tokens, inner, out], input.epilogue, (&x, &weight, &bias, &y))
    };
    // SAFETY: as in `linear_into`; the sum is borrowed mutably, and so is elsewhere than x.
    launch.end(unsafe { sys::anabranch_linear(&raw const params, launch.raw_stream()) })
}

/// [`linear_into`] new memory.
///
/// # Errors
/// Those of [`linear_into`], and [`Error::OutOfMemory`].
pub fn linear<O: GemmOutput>(stream: &Stream, input: &LinearInput<'_>) -> Result<Tensor<O>> {
    let [num_tokens, _, out] = input.sizes()?;
    let shape = [num_tokens, out].into();
    let mut y = Tensor::from_parts(stream.alloc(num_tokens * out)?, shape);
    linear_into(stream, input, &mut y.view_mut())?;
    Ok(y)
}

#[cfg(test)]
mod tests {
    use super::{CUBLASLT_FROM_TOKENS, Way, way};
    use crate::cuda::{Epilogue, Tile};

    #[test]
    fn cublaslt_computes_plain_products_of_many_tokens() {
        let from = Some(CUBLASLT_FROM_TOKENS);
        let plain = |tokens, from| way(tokens, Epilogue::Linear, false, Tile::Auto, from);
        assert_eq!(plain(CUBLASLT_FROM_TOKENS, from), Way::CublasLt);
        assert_eq!(plain(CUBLASLT_FROM_TOKENS - 1, from), Way::Own);
        assert_eq!(plain(1 << 20, None), Way::Own);
        // Nothing is multiplied without tokens, from however few on.
        assert_eq!((plain(0, Some(0)), plain(1, Some(0))), (Way::Own, Way::CublasLt));
        for epilogue in [Epilogue::Relu, Epilogue::Gelu, Epilogue::SwiGlu] {
            assert_eq!(way(4096, epilogue, false, Tile::Auto, from), Way::Own, "{epilogue:?}");
        }
        assert_eq!(way(4096, Epilogue::Linear, true, Tile::Auto, from), Way::Own);
        assert_eq!(way(4096, Epilogue::Linear, false, Tile::Rows128, from), Way::Own);
    }
}
