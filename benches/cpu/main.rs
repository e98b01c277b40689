//! Benches of the reference, one module per operation: `cargo bench --bench cpu`.

mod moe_layer;
mod router;

criterion::criterion_group!(benches, router::bench, moe_layer::bench);
criterion::criterion_main!(benches);

/// Deterministic values in [-1, 1).
fn noise(count: usize, mut state: u64) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f32 / (1u64 << 30) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}
