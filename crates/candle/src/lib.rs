//! anabranch's mixture-of-experts layer on [candle](candle_core)'s tensors: on their device, on their stream, where they
//! are.
//!
//! [`moe_forward`] is the layer from router logits; [`FusedMoe`] has the constructor and the call of candle-transformers'
//! layer of the same name, so that a model changes one `use`. Tensors are bf16 and contiguous: candle's `FusedMoe` also takes
//! f16, here it is refused with the conversion named. There is no backward pass: the result does not track its inputs.

mod fused_moe;
mod layer;
mod tensors;

/// The routing's types.
pub use anabranch::{Adaptive, Capacity, GroupLimit, GroupScore, Renormalize, Routing, Score};
pub use fused_moe::FusedMoe;
pub use layer::{Experts, moe_forward};
