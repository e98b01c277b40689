//! One MoE layer at a quarter of Qwen3-30B-A3B's experts, bfloat16 weights: one token (bytes bound) and 256 (FLOPs bound).

use anabranch::{
    Dtype, Renormalize, Routing,
    reference::{Expert, Matrix, MoeLayer},
};
use criterion::{Criterion, Throughput};

pub(crate) fn bench(criterion: &mut Criterion) {
    let (d, n, experts, topk) = (2048, 768, 32, 8);
    let stored = |count, seed| -> Vec<u8> {
        super::noise(count, seed).into_iter().flat_map(|v| half::bf16::from_f32(0.05 * v).to_le_bytes()).collect()
    };
    let (gate, gate_up, down) = (stored(experts * d, 1), stored(experts * 2 * n * d, 2), stored(experts * d * n, 3));
    let matrix = |rows, columns, bytes| Matrix::new(Dtype::Bf16, rows, columns, bytes).expect("the sizes fit");
    let layer = MoeLayer {
        routing: Routing::builder(experts, topk).renormalize(Renormalize::Sum).build().expect("a published routing"),
        gate: matrix(experts, d, &gate).into(),
        selection_bias: None,
        experts: gate_up
            .chunks(4 * n * d)
            .zip(down.chunks(2 * n * d))
            .map(|(u, w)| Expert::swiglu_stacked(matrix(2 * n, d, u), matrix(d, n, w)).expect("an even number of rows"))
            .collect(),
        shared: None,
    };
    let mut group = criterion.benchmark_group("moe_layer");
    group.sample_size(10);
    for tokens in [1, 256] {
        let x = super::noise(tokens * d, 4);
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(format!("qwen3/{tokens}"), |bencher| bencher.iter(|| layer.forward(&x, None)));
    }
    group.finish();
}
