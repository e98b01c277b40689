//! Mixture-of-experts language models in the Hugging Face layout, composed from anabranch's operations.

pub mod checkpoint;
pub mod config;
mod error;
pub mod memory;

pub use checkpoint::{Checkpoint, Tensor, TensorFile};
pub use config::Config;
pub use error::{Error, Result};
