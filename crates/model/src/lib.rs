//! Mixture-of-experts language models in the Hugging Face layout, composed from anabranch's operations.

pub mod analysis;
mod backend;
pub mod checkpoint;
pub mod config;
mod cpu;
mod error;
mod families;
pub mod memory;
mod model;
pub mod presets;
pub mod tensors;
pub mod weights;

pub use backend::{Backend, Batch, Positions, Segment, TopkIds};
pub use checkpoint::{Checkpoint, Tensor, TensorFile};
pub use config::Config;
pub use cpu::{Cpu, CpuAttention, CpuCache, CpuTensor};
pub use error::{Error, Result};
pub use model::{Model, Observer};
