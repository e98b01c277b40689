//! Mixture-of-experts language models in the Hugging Face layout, composed from anabranch's operations.

mod batch;
mod chat;
pub mod checkpoint;
pub mod config;
mod error;
mod generate;
pub mod memory;
mod text_stream;
mod tokenizer;

pub use batch::{Batch, Segment};
pub use chat::{ChatTemplate, Message, Reply, SpecialTokens};
pub use checkpoint::{Checkpoint, Tensor, TensorFile};
pub use config::Config;
pub use error::{Error, Result};
pub use generate::{Finish, Forward, GenerateOptions, Generated, Generation, Stats, generate};
pub use text_stream::TextStream;
pub use tokenizer::Tokenizer;
