//! The operations on a GPU, at the shapes of named models. One binary, because each carries every kernel; a module an
//! operation.
//!
//! Each point is a CUDA graph of launches over rotating buffers, which together are larger than the second-level cache where
//! the operation's own data allows, timed by CUDA events and divided by their number: the time that a launch takes within a
//! model's step, its gap to the next one included.

mod attention;
mod combine;
mod grouped_gemm;
mod linear;
mod moe_layer;
mod permute;
mod rms_norm;
mod rope;
mod router;
mod rows;
mod sampling;
mod shapes;
mod timing;

criterion::criterion_group!(
    benches,
    router::bench,
    permute::bench,
    grouped_gemm::bench,
    linear::bench,
    combine::bench,
    moe_layer::bench,
    rms_norm::bench,
    rope::bench,
    attention::bench,
    rows::bench,
    sampling::bench
);
criterion::criterion_main!(benches);
