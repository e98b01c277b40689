//! Mixture-of-experts transformer operations: CUDA kernels in safe Rust, and the CPU reference that specifies them.

#[cfg(feature = "cuda")]
pub mod cuda;
mod dtype;
mod error;
pub mod reference;
mod rope;
mod routing;
mod sampling;

pub use dtype::{Dtype, f8e4m3_to_f32};
pub use error::{Error, Result};
pub use rope::{Rope, RopeLayout, RopeScaling, yarn_mscale};
pub use routing::{
    Adaptive, Capacity, GroupLimit, GroupScore, MAX_EXPERTS, MAX_TOPK, Renormalize, Routing, RoutingBuilder, Score,
};
pub use sampling::{Sampling, SamplingBuilder};
