//! The operations on a GPU against the reference. One binary, because each carries every kernel; a module an operation.
//!
//! `cargo test --features cuda --test gpu -- --ignored`, or `cargo xtask stage` for a machine without the sources.
//! `ANABRANCH_CASES` is the number of cases of each property (512), `ANABRANCH_GOLDEN` the folder of golden data,
//! and `ANABRANCH_REQUIRE_GPU=1` makes a missing GPU a failure.

mod attention;
mod combine;
mod decode_step;
mod failures;
mod grouped_gemm;
#[path = "../common/layers.rs"]
mod layers;
mod moe_layer;
mod numbers;
mod permute;
mod pinned;
mod random;
mod rms_norm;
mod rope;
mod router;
mod router_logits;
mod rows;
mod sampling;
mod support;
