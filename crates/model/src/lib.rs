//! Mixture-of-experts language models in the Hugging Face layout, composed from anabranch's operations.

pub mod analysis;
pub mod checkpoint;
pub mod config;
mod error;
mod families;
pub mod init;
pub mod memory;
pub mod presets;
pub mod tensors;

pub use checkpoint::{Checkpoint, Tensor, TensorFile};
pub use config::Config;
pub use error::{Error, Result};
