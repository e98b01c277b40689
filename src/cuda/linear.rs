//! Dense products: for a few tokens a kernel that streams the weights, for many cuBLASLt where a stream has it, else the grouped
//! product with one expert that has every row.

use half::bf16;

use super::{
    Epilogue, GemmOutput, Stream, Tensor, Tile, View, ViewMut,
    cublaslt::CublasLt,
    grouped_gemm::{check_rows, check_width, columns, epilogue, matrix, tile, weight_rows},
    launch::{Launch, Pointer, launched},
    sys,
};
use crate::Result;

const OPERATION: &str = "linear";

/// From so many tokens on cuBLASLt is worth it: below, a product takes as long as its weights take to be read, whoever does it.
pub const CUBLASLT_FROM_TOKENS: usize = 64;

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
/// The kernels' own product is one launch, and sums in an order that depends on the inner width and on whether there are few tokens: up to
/// 4 (fewer where they are very wide) have a kernel of their own, with [`Tile::Auto`] and the epilogue [`Epilogue::Linear`], or
/// [`Epilogue::SwiGlu`] without a bias.
///
/// Where the stream has cuBLASLt ([`Stream::enable_cublaslt`]), that computes what has neither bias nor epilogue, with [`Tile::Auto`],
/// from the number of tokens on that the stream was given, except for shapes that it has no repeatable algorithm for: in one launch or
/// two, in an order that depends on all three sizes and on the library's release.
///
/// # Errors
/// As [`grouped_gemm_into`](super::grouped_gemm_into); [`Error::Launch`](crate::Error::Launch) also with what cuBLASLt reports.
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
    if takes_few(input, num_tokens, inner)? {
        let params = sys::AnabranchLinearParams {
            num_tokens: num_tokens as u64,
            in_features: inner as u32,
            out_features: out as u32,
            epilogue: epilogue(input.epilogue),
            y_dtype: O::DTYPE,
            x: x.pointer.cast(),
            weights: weight.pointer.cast(),
            bias: bias.pointer,
            y: y.pointer.cast(),
        };
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

/// Whether the kernel for few tokens is the one.
fn takes_few(input: &LinearInput<'_>, num_tokens: usize, inner: usize) -> Result<bool> {
    let known = match input.epilogue {
        Epilogue::Linear => true,
        Epilogue::SwiGlu => input.bias.is_none(),
        Epilogue::Relu | Epilogue::Gelu => false,
    };
    if !known || input.tile != Tile::Auto {
        return Ok(false);
    }
    let mut takes = 0;
    // SAFETY: `takes` is a live value of its type.
    let status = unsafe { sys::anabranch_linear_takes(num_tokens as u64, inner as u32, &raw mut takes) };
    launched(OPERATION, status)?;
    Ok(takes != 0)
}

/// [`linear_into`] new memory.
///
/// # Errors
/// Those of [`linear_into`], and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
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
