//! Models on a GPU against what Transformers computed in float32, and against the CPU. One binary, because it carries every kernel.
//!
//! `cargo test --package anabranch-model --features cuda --test gpu -- --ignored`, or `cargo xtask stage` for a machine without the
//! sources. `ANABRANCH_GOLDEN` is the folder of golden data, and `ANABRANCH_REQUIRE_GPU=1` makes a missing GPU a failure.

mod decode;
mod engine;
mod failures;
mod latent;
mod loading;
mod memory;
mod parity;
mod routing;
mod sampling;
mod support;
