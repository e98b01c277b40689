//! Values to compute with, and how results are compared.

use anabranch::cuda::{
    Stream,
    cudarc::driver::{
        CudaGraph,
        sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
    },
};
use half::bf16;

use crate::support::Noise;

/// The largest relative error of rounding to bf16.
pub(crate) const BF16: f64 = 1.0 / 256.0;

/// Standard normal values.
pub(crate) fn normals(noise: &mut Noise, count: usize) -> Vec<bf16> {
    (0..count).map(|_| bf16::from_f32(noise.normal())).collect()
}

pub(crate) fn widen(values: &[bf16]) -> Vec<f64> {
    values.iter().map(|value| value.to_f64()).collect()
}

/// Bits, which compare where NaN does not.
pub(crate) fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Checks every element against `bound(index, expected)`, NaN and infinity exactly, and all of them by ||got - expected|| /
/// ||expected|| < 5e-3.
pub(crate) fn close(got: &[f64], expected: &[f64], bound: impl Fn(usize, f64) -> f64) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{} values where {} belong", got.len(), expected.len()));
    }
    let (mut error, mut norm) = (0.0, 0.0);
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        if !expected.is_finite() {
            if got.to_bits() != expected.to_bits() && !(got.is_nan() && expected.is_nan()) {
                return Err(format!("element {at} is {got}, not {expected}"));
            }
            continue;
        }
        let (difference, bound) = ((got - expected).abs(), bound(at, *expected));
        if difference.is_nan() || difference > bound {
            return Err(format!("element {at} is {got}, not {expected}: {difference:e} apart, more than {bound:e}"));
        }
        error += difference * difference;
        norm += expected * expected;
    }
    if error.sqrt() <= 5e-3 * norm.sqrt() {
        return Ok(());
    }
    Err(format!("relative error {:e}", (error / norm).sqrt()))
}

/// What `launch` enqueues, as a graph. Anything that waits for the stream or allocates on the side would break the capture.
/// It is called once before, because kernels are loaded at their first launch.
pub(crate) fn capture(stream: &Stream, mut launch: impl FnMut()) -> CudaGraph {
    launch();
    stream.synchronize().unwrap();
    stream.cudarc().begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    launch();
    stream.cudarc().end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap()
}
