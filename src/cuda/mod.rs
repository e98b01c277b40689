//! The operations on an NVIDIA GPU of compute capability 8.0 or newer (feature `cuda`).
//!
//! A [`Device`] is opened once, a [`Stream`] orders work on it, and a [`Tensor`] is its memory. Every operation has two
//! forms: one that allocates its result, and an `_into` form that writes into the caller's buffers, asks for its workspace
//! by size, allocates nothing and waits for nothing, so that it can be captured in a CUDA graph.
//!
//! A program with this feature starts on a machine that has neither GPU nor driver; [`Device::open`] says so there.
//!
//! Who brings buffers of their own passes views of cudarc's: [`View::new`], [`ViewMut::new`], [`Stream::from_cudarc`].

mod attention;
mod checks;
mod combine;
mod cublaslt;
mod decode_step;
mod device;
mod graph;
mod grouped_gemm;
mod launch;
mod linear;
mod moe_layer;
mod permute;
mod pinned;
mod random;
mod rms_norm;
mod rope;
mod router;
mod router_logits;
mod rows;
mod sampling;
mod stream;
#[doc(hidden)]
pub mod sys;
mod tensor;

pub use attention::{AttentionBatch, AttentionInput, attention, attention_into, attention_workspace};
pub use checks::{Float, HeadRange};
pub use combine::{CombineInput, combine, combine_into};
pub use cublaslt::cublaslt_version;
/// The release of cudarc whose contexts, streams and buffers are taken here.
pub use cudarc;
pub use decode_step::{DecodeLayer, DecodeProjections, DecodeRouter, DecodeSequence, DecodeShape, DecodeStep};
pub use device::Device;
pub use graph::{Graph, Recording};
pub use grouped_gemm::{Epilogue, Gather, GemmOutput, GroupedGemmInput, Tile, grouped_gemm, grouped_gemm_into};
pub use linear::{
    CUBLASLT_FROM_TOKENS, LinearInput, NormLinearInput, linear, linear_into, norm_linear_into, norm_linear_takes,
};
pub use moe_layer::{Arch, MoeBlock, MoeBuffers, MoeInput, MoeLayer, MoePlan, MoeRouting, MoeShape, TopkBuffers};
pub use permute::{
    NO_SLOT, PermuteBuffers, PermuteOutput, permute, permute_into, permute_rows, permute_rows_into, permute_workspace,
};
pub use pinned::Pinned;
pub use random::{checksum, checksum_into, random, random_into};
pub use rms_norm::{add_rms_norm_into, rms_norm, rms_norm_heads_into, rms_norm_into};
pub use rope::{HeadNorm, RopeBuffers, RopeCache, RopeTable, rope_into};
pub use router::{RouterBuffers, RouterInput, RouterOutput, router, router_into, router_workspace};
pub use router_logits::{RouterLogitsInput, router_logits, router_logits_into};
pub use rows::{add_into, embedding, embedding_into};
pub use sampling::{SampleInput, SampleRow, argmax, argmax_into, argmax_workspace, sample, sample_into};
pub use stream::Stream;
pub use tensor::{Element, Shape, Tensor, View, ViewMut};
