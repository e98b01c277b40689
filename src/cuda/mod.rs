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
mod device;
mod launch;
mod router;
mod stream;
mod sys;
mod tensor;

pub use attention::{AttentionBatch, AttentionInput, attention, attention_into, attention_workspace};
/// The release of cudarc whose contexts, streams and buffers are taken here.
pub use cudarc;
pub use device::Device;
pub use router::{RouterBuffers, RouterInput, RouterOutput, router, router_into, router_workspace};
pub use stream::Stream;
pub use tensor::{Element, Shape, Tensor, View, ViewMut};
