//! Dense products: for a few tokens a kernel that streams the weights, else the grouped product with one expert that has every row.

use half::bf16;

use super::{
    Epilogue, GemmOutput, Stream, Tensor, Tile, View, ViewMut,
    grouped_gemm::{check_rows, check_width, columns, epilogue, matrix, tile, weight_rows},
    launch::{Launch, Pointer, launched},
    sys,
};
use crate::Result;

const OPERATION: &str = "linear";

/// What [`linear_into`] reads.
#[derive(Debug)]
pub struct LinearInput<'a> {
    /// `[T, in]`; the width a multiple of 8.
    pub x: View<'a, bf16>,
    /// `[out, in]`, or `[2 out, in]` with [`Epilogue::SwiGlu`]; out a multiple of 8.
    pub weight: View<'a, bf16>,
    /// `[out]`.
    pub bias: Option<View<'a, f32>>,
    /// Done to every product.
    pub epilogue: Epilogue,
    /// [`Tile::Auto`] but to measure or test.
    pub tile: Tile,
}

impl LinearInput<'_> {
    /// T, in, out.
    fn sizes(&self) -> Result<[usize; 3]> {
        let [num_tokens, inner] = matrix(OPERATION, "x", &self.x)?;
        let [weight_rows, _] = matrix(OPERATION, "weight", &self.weight)?;
        check_width(OPERATION, "in features", inner)?;
        check_rows(OPERATION, num_tokens)?;
        Ok([num_tokens, inner, columns(OPERATION, self.epilogue, weight_rows, self.bias.is_some())?])
    }
}

/// `y[T, out] = epilogue(x W^T + b)`, as [`reference::linear`](crate::reference::linear) specifies, summed in float32 in an order that
/// depends on the inner width and on whether there are few tokens: up to 8 (fewer where they are very wide), without an activation and with
/// [`Tile::Auto`], have a kernel of their own. One launch; `2 T in out` FLOP or one read of the weight, whichever takes longer.
///
/// # Errors
/// As [`grouped_gemm_into`](super::grouped_gemm_into).
pub fn linear_into<O: GemmOutput>(stream: &Stream, input: &LinearInput<'_>, y: &mut ViewMut<'_, O>) -> Result<()> {
    let [num_tokens, inner, out] = input.sizes()?;
    let launch = Launch::begin(OPERATION, stream)?;
    let few = takes_few(input, num_tokens, inner)?;
    let x = launch.read("x", &input.x, [num_tokens, inner])?;
    let weight = launch.read("weight", &input.weight, [weight_rows(input.epilogue, out), inner])?;
    let bias = match &input.bias {
        Some(bias) => launch.read("bias", bias, [out])?,
        None => Pointer::null(),
    };
    let y = launch.write("y", y, [num_tokens, out])?;
    if few {
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
    if !matches!(input.tile, Tile::Auto) || !matches!(input.epilogue, Epilogue::Linear | Epilogue::SwiGlu) {
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
