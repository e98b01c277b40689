//! Mixture-of-experts language models in the Hugging Face layout, composed from anabranch's operations.

pub mod config;
mod error;

pub use config::Config;
pub use error::{Error, Result};
