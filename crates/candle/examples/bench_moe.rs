//! The layer by candle and by this library, side by side: T = 1 to 4,096 at the shapes of published models.
//!
//!     cargo run --release --example bench_moe [qwen3 dsmoe16b mixtral]
//!
//! Median microseconds of a call, gate included, each followed by a wait; random weights. `-`: candle's layer fails there.

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Instant;

use anabranch_candle::FusedMoe;
use candle_core::{DType, Device, Result, Tensor};
use support::Sizes;

const SHAPES: [(&str, Sizes); 3] = [
    ("qwen3", Sizes { experts: 128, topk: 8, hidden: 2048, width: 768 }),
    ("dsmoe16b", Sizes { experts: 64, topk: 6, hidden: 2048, width: 1408 }),
    ("mixtral", Sizes { experts: 8, topk: 2, hidden: 4096, width: 14336 }),
];
const SAMPLES: usize = 15;

fn median(device: &Device, call: impl Fn() -> Result<Tensor>) -> Result<f64> {
    let sample = || -> Result<f64> {
        let start = Instant::now();
        let out = call()?;
        device.synchronize()?;
        let micros = start.elapsed().as_secs_f64() * 1e6;
        drop(out);
        Ok(micros)
    };
    for _ in 0..3 {
        sample()?;
    }
    let mut times = (0..SAMPLES).map(|_| sample()).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[SAMPLES / 2])
}

fn main() -> Result<()> {
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    let device = Device::new_cuda_with_stream(0)?;
    println!("{:<10}{:>6}{:>12}{:>12}{:>8}", "model", "T", "anabranch", "candle", "x");
    for (name, sizes) in SHAPES {
        if !chosen.is_empty() && !chosen.iter().any(|chosen| chosen == name) {
            continue;
        }
        let weights = sizes.weights(DType::BF16, &device)?;
        let ours = FusedMoe::new(&sizes.config(true), weights.clone(), DType::BF16)?;
        let theirs = candle_transformers::fused_moe::FusedMoe::new(&sizes.config(true), weights, DType::BF16)?;
        for tokens in [1, 8, 64, 512, 4096] {
            let xs = Tensor::randn(0_f32, 1.0, (1, tokens, sizes.hidden), &device)?.to_dtype(DType::BF16)?;
            let left = median(&device, || ours.forward(&xs, tokens > 1))?;
            print!("{name:<10}{tokens:>6}{left:>12.1}");
            match median(&device, || theirs.forward(&xs, tokens > 1)) {
                Ok(right) => println!("{right:>12.1}{:>8.2}", right / left),
                Err(_) => println!("{:>12}{:>8}", "-", "-"),
            }
        }
    }
    Ok(())
}
