//! Mixture-of-experts language models in the Hugging Face layout, composed from anabranch's operations.

pub mod analysis;
mod backend;
mod chat;
pub mod checkpoint;
pub mod config;
mod cpu;
mod error;
mod families;
mod model;
pub mod presets;
pub mod tensors;
pub mod weights;

pub use backend::{Backend, Batch, Positions, Segment, TopkIds};
mod generate;
pub mod memory;
mod text_stream;
mod tokenizer;

pub use chat::{ChatTemplate, Message, Reply, SpecialTokens};
pub use checkpoint::{Checkpoint, Tensor, TensorFile};
pub use config::Config;
pub use cpu::{Cpu, CpuAttention, CpuCache, CpuTensor};
pub use error::{Error, Result};
pub use generate::{Finish, Forward, GenerateOptions, Generated, Generation, Stats, generate};
pub use model::{Model, Observer, Session};
pub use text_stream::TextStream;
pub use tokenizer::Tokenizer;
