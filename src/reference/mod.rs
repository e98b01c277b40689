//! The specification: every operation in plain Rust, to be read beside the papers. It is also the CPU backend.
//!
//! Activations are row-major slices of [`Real`] (float32; float64 where a test wants it), weights are [`Matrix`]
//! views of whatever the checkpoint stores. Shapes are `[rows, columns]`; T, E, K, d, n are tokens, experts, experts per
//! token, hidden size and expert width. All results are deterministic: the same call gives the same bits.

mod attention;
mod combine;
mod embedding;
mod grouped_gemm;
mod latent_attention;
mod linear;
mod matrix;
mod moe_layer;
mod paged_rows;
mod permute;
mod random;
mod real;
mod rms_norm;
mod rope;
mod router;
mod sampling;

pub use attention::{AttentionShape, attention};
pub use combine::combine;
pub use embedding::embedding;
pub use grouped_gemm::{Activation, Expert, expert_forward, grouped_gemm};
pub use latent_attention::{LatentShape, latent_attention};
pub use linear::{Linear, View, linear, matmul};
pub use matrix::{BlockScales, Matrix};
pub use moe_layer::{MoeLayer, MoeOutput, SharedExpert};
pub use paged_rows::paged_rows;
pub use permute::Permutation;
pub use random::{checksum, random, random_from};
pub use real::Real;
pub use rms_norm::{rms_norm, rms_norm_heads};
pub use rope::{RopeTable, rotate};
pub use router::{RouterOutput, router, scores, topk_weights};
pub use sampling::{Candidate, candidates, sample};
