//! One MoE layer on the CPU: bfloat16 weights as a checkpoint stores them, float32 arithmetic, one shared expert.
//!
//!     cargo run --release --example moe_layer

use std::time::Instant;

use anabranch::{
    Dtype, Result, Routing,
    reference::{Expert, Matrix, MoeLayer, SharedExpert},
};

/// Random bfloat16 of about the given size, as bytes.
fn weights(count: usize, size: f32, state: &mut u64) -> Vec<u8> {
    let mut next = || {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        half::bf16::from_f32(size * ((*state >> 40) as f32 / (1 << 23) as f32 - 1.0))
    };
    (0..count).flat_map(|_| next().to_le_bytes()).collect()
}

fn main() -> Result<()> {
    let (tokens, d, n, experts, topk) = (64, 512, 256, 16, 4);
    let mut state = 2026;
    let gate = weights(experts * d, 0.1, &mut state);
    let gate_up = weights(experts * 2 * n * d, 0.05, &mut state);
    let down = weights(experts * d * n, 0.05, &mut state);
    let (shared_gate_up, shared_down) = (weights(2 * n * d, 0.05, &mut state), weights(d * n, 0.05, &mut state));
    let expert = |gate_up, down| {
        Expert::swiglu_stacked(Matrix::new(Dtype::Bf16, 2 * n, d, gate_up)?, Matrix::new(Dtype::Bf16, d, n, down)?)
    };
    let layer = MoeLayer {
        routing: Routing::builder(experts, topk).build()?,
        gate: Matrix::new(Dtype::Bf16, experts, d, &gate)?.into(),
        selection_bias: None,
        experts: gate_up
            .chunks(4 * n * d)
            .zip(down.chunks(2 * n * d))
            .map(|(u, w)| expert(u, w))
            .collect::<Result<_>>()?,
        shared: Some(SharedExpert { expert: expert(&shared_gate_up, &shared_down)?, gate: None }),
    };
    let x: Vec<f32> = (0..tokens * d).map(|i| (i as f32 * 0.37).sin()).collect();
    let start = Instant::now();
    let out = layer.forward(&x, None)?;
    let flops = (6 * tokens * (topk + 1) * d * n + 2 * tokens * d * experts) as f64;
    let seconds = start.elapsed().as_secs_f64();
    println!("{tokens} tokens, {experts} experts of {d} x {n}, {topk} each and a shared one");
    println!("tokens per expert {:?}", out.routing.expert_counts);
    println!(
        "token 0 visits {:?} with weights {:.3?}",
        &out.routing.topk_ids[..topk],
        &out.routing.topk_weights[..topk]
    );
    println!("y[0][..4] = {:.4?}", &out.y[..4]);
    println!("{:.2} ms, {:.1} GFLOP/s", seconds * 1e3, flops / seconds / 1e9);
    Ok(())
}
