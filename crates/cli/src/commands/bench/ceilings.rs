//! What the GPU reaches at best, measured beside the layer.

use super::measure::{Bench, driver};
use crate::failure::Failure;
use anabranch::{
    Routing,
    cuda::{Arch, MoeInput, MoeLayer, MoeRouting, MoeShape, checksum_into, random},
};
use half::bf16;

/// Rates that bound a layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ceilings {
    /// Reading alone, TB/s.
    pub(super) read: f64,
    /// Reading and writing, both counted, TB/s.
    pub(super) copy: f64,
    /// One expert that has every token: an own matrix product, TFLOP/s.
    pub(super) gemm: f64,
}

/// Words of the array that is read.
const WORDS: usize = 1 << 29;
/// Tokens, hidden size and width of the dense layer.
const DENSE: [usize; 3] = [16_384, 4096, 4096];

impl Ceilings {
    /// Takes 4 GiB of memory for a moment, and about 0.2 s.
    pub(super) fn measure(bench: &Bench, arch: Arch) -> Result<Self, Failure> {
        let (read, copy) = bandwidths(bench)?;
        let gemm = dense(bench, arch)?;
        bench.stream.synchronize()?;
        Ok(Self { read, copy, gemm })
    }
}

fn bandwidths(bench: &Bench) -> Result<(f64, f64), Failure> {
    let stream = bench.stream.clone();
    let from = stream.zeros::<u32>([WORDS])?;
    let mut to = stream.zeros::<u32>([WORDS])?;
    let mut sum = stream.zeros::<u32>([1])?;
    let bytes = 4.0 * WORDS as f64;
    let read = bench.median_of(|stream| Ok(checksum_into(stream, &from.view(), &mut sum.view_mut())?))?;
    let copy = bench.median_of(|stream| {
        stream.cudarc().memcpy_dtod(from.view().cudarc(), to.view_mut().cudarc()).map_err(driver)
    })?;
    Ok((bytes / read / 1e6, 2.0 * bytes / copy / 1e6))
}

fn dense(bench: &Bench, arch: Arch) -> Result<f64, Failure> {
    let stream = bench.stream.clone();
    let [tokens, d, n] = DENSE;
    let shape =
        MoeShape { routing: Routing::builder(1, 1).build()?, hidden_size: d, intermediate_size: n, num_shared: 0 };
    let layer = MoeLayer::plan(stream.device(), &shape, tokens, arch)?;
    let x = random::<bf16>(&stream, [tokens, d], 1, 1.0)?;
    let gate_up = random::<bf16>(&stream, [1, 2 * n, d], 2, (d as f32).powf(-0.5))?;
    let down = random::<bf16>(&stream, [1, d, n], 3, (n as f32).powf(-0.5))?;
    let logits = stream.zeros::<f32>([tokens, 1])?;
    let mut workspace = layer.workspace(&stream)?;
    let mut out = stream.zeros::<bf16>([tokens, d])?;
    let us = bench.median_of(|stream| {
        let input = MoeInput {
            x: x.view(),
            routing: MoeRouting::Logits { logits: logits.view(), selection_bias: None },
            shared_gate: None,
            gate_up: gate_up.view(),
            down: down.view(),
        };
        Ok(layer.forward_into(stream, &input, &mut workspace.view_mut(), &mut out.view_mut().into())?)
    })?;
    Ok(layer.describe().flops() / us / 1e6)
}
