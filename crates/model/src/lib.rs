//! Mixture-of-experts language models in the Hugging Face layout, composed from anabranch's operations.
//!
//! ```no_run
//! use anabranch::Sampling;
//! use anabranch_model::{Cpu, GenerateOptions, Model, Session, Tokenizer, generate};
//!
//! let dir = std::path::Path::new("tests/golden/models/deepseek-v3");
//! let model = Model::load(dir, Cpu, &mut |_, _| {})?;
//! let tokenizer = Tokenizer::from_dir(dir)?;
//! let options = GenerateOptions {
//!     max_new_tokens: 32,
//!     sampling: Sampling::greedy(),
//!     seed: 0,
//!     stop: Vec::new(),
//!     eos: model.config().eos_token_ids.clone(),
//!     batch_size: 8,
//!     cache_tokens: None,
//! };
//! let prompts = [tokenizer.encode("A mixture of experts")?];
//! let mut print = |_: usize, piece: &str| {
//!     print!("{piece}");
//!     Ok(())
//! };
//! generate(&mut Session::new(&model)?, &tokenizer, &prompts, &options, &|| false, &mut print)?;
//! # Ok::<(), anabranch_model::Error>(())
//! ```
//!
//! With the feature `cuda`, `Cuda::open(0)?` in the place of `Cpu` runs the same on a GPU.

pub mod analysis;
mod backend;
mod blocks;
mod chat;
pub mod checkpoint;
pub mod config;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod engine;
mod error;
mod expert_usage;
mod families;
mod generate;
pub mod init;
pub mod memory;
mod model;
pub mod presets;
pub mod tensors;
mod text_stream;
mod tokenizer;
pub mod weights;
mod whole_file;

pub use backend::{Backend, Batch, Block, Draw, Routed, Segment, TopkIds};
pub use blocks::{BLOCK_SIZE, blocks_for};
pub use chat::{ChatTemplate, Message, Reply, SpecialTokens};
pub use checkpoint::{Checkpoint, Tensor, TensorFile};
pub use config::Config;
pub use cpu::{Cpu, CpuAttention, CpuCache, CpuTensor};
#[cfg(feature = "cuda")]
pub use cuda::{Cuda, CudaAttention, CudaCache, CudaFeedForward, CudaHidden, CudaNorm, CudaTable, GpuUsage};
pub use engine::{Engine, Event, Finish, Forward, Limits, Request, RequestId, Step};
pub use error::{Error, Result};
pub use expert_usage::{ExpertUsage, LayerUsage};
pub use generate::{GenerateOptions, Generated, Generation, Stats, generate};
pub use model::{GivenRouting, Model, Observer, Session};
pub use text_stream::TextStream;
pub use tokenizer::Tokenizer;
pub use whole_file::{check_writable, write_whole};
