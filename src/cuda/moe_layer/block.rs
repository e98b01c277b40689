//! A layer with what comes before it in a transformer's block.

use half::bf16;

use super::{MoeLayer, TopkBuffers, require};
use crate::{
    Adaptive, Result,
    cuda::{
        Stream, View, ViewMut,
        checks::matrix,
        launch::{Launch, Pointer},
        sys,
    },
};

const OPERATION: &str = "moe_block";

/// What [`MoeLayer::forward_block_into`] reads and writes.
#[derive(Debug)]
pub struct MoeBlock<'a> {
    /// `[T, d]`: the residual stream, to which `delta` is added.
    pub residual: ViewMut<'a, bf16>,
    /// `[T, d]`: what the attention before it adds to the residual stream, if that is still to be done.
    pub delta: Option<View<'a, bf16>>,
    /// `[d]`.
    pub norm_weight: View<'a, f32>,
    /// Of the norm.
    pub norm_eps: f32,
    /// `[E, d]`: the router's gate.
    pub gate: View<'a, bf16>,
    /// `[E]`: steers the choice but never the weights.
    pub selection_bias: Option<View<'a, f32>>,
    /// `[E + S, 2 n, d]`, as the layer has it. Shared experts have weight one.
    pub gate_up: View<'a, bf16>,
    /// `[E + S, d, n]`.
    pub down: View<'a, bf16>,
    /// `[T, d]`: written, the norm of the residual stream.
    pub x: ViewMut<'a, bf16>,
    /// `[T, E]`: written, the gate product.
    pub logits: ViewMut<'a, f32>,
    /// Who visited whom, for who wants to know.
    pub topk: Option<TopkBuffers<'a>>,
    /// `[T, d]`: written, what the layer adds to the residual stream, which is left to the next norm.
    pub out: ViewMut<'a, bf16>,
}

impl MoeLayer {
    /// A transformer's block from its residual stream to what its experts add to it:
    ///
    /// ```text
    /// residual += delta      x = norm(residual)      logits = x gate^T      out = layer(x, logits)
    /// ```
    ///
    /// as [`add_rms_norm_into`](crate::cuda::add_rms_norm_into), [`router_logits_into`](crate::cuda::router_logits_into) and
    /// [`MoeLayer::forward_into`] do one after another, whose results these are up to the order of the norm's sum. With
    /// up to 8 tokens and 256 experts on a GPU of capability 9.0 all that comes before the expert products is one
    /// launch instead of three: 3 us less of a decode step's layer on an H200.
    ///
    /// # Errors
    /// Those of the three, under the name `moe_block`.
    pub fn forward_block_into(
        &self,
        stream: &Stream,
        block: &mut MoeBlock<'_>,
        workspace: &mut ViewMut<'_, u8>,
    ) -> Result<()> {
        let shape = self.shape;
        let (d, n, experts, topk) =
            (shape.hidden_size, shape.intermediate_size, shape.routing.num_experts(), shape.routing.topk());
        let [num_tokens, _] = matrix(OPERATION, "residual", block.residual.shape())?;
        self.check_place(stream)?;
        self.check_tokens(num_tokens)?;
        let complexity = shape.routing.adaptive() == Adaptive::Complexity;
        require(!complexity, "routing", || "one that needs no complexity".to_owned(), "Adaptive::Complexity")?;

        let launch = Launch::begin(OPERATION, stream)?;
        let (tokens, all) = ([num_tokens, d], experts + shape.num_shared);
        let residual = launch.write("residual", &mut block.residual, tokens)?;
        let delta = match &block.delta {
            Some(delta) => launch.read("delta", delta, tokens)?,
            None => Pointer::null(),
        };
        let norm_weight = launch.read("norm_weight", &block.norm_weight, [d])?;
        let gate = launch.read("gate", &block.gate, [experts, d])?;
        let selection_bias = match &block.selection_bias {
            Some(bias) => launch.read("selection_bias", bias, [experts])?,
            None => Pointer::null(),
        };
        let gate_up = launch.read("gate_up", &block.gate_up, [all, 2 * n, d])?;
        let down = launch.read("down", &block.down, [all, d, n])?;
        let x = launch.write("x", &mut block.x, tokens)?;
        let logits = launch.write("logits", &mut block.logits, [num_tokens, experts])?;
        let (topk_ids, topk_weights) = match &mut block.topk {
            Some(out) => (
                launch.write("topk ids", &mut out.ids, [num_tokens, topk])?,
                launch.write("topk weights", &mut out.weights, [num_tokens, topk])?,
            ),
            None => (Pointer::null(), Pointer::null()),
        };
        let out = launch.write("out", &mut block.out, tokens)?;
        let workspace_bytes = workspace.shape().len();
        let workspace = launch.workspace(workspace, self.plan.workspace_bytes)?;
        let params = sys::AnabranchMoeBlockParams {
            shape: shape.to_sys(num_tokens, self.arch)?,
            num_tokens: num_tokens as u64,
            residual: residual.pointer.cast(),
            delta: delta.pointer.cast(),
            norm_weight: norm_weight.pointer,
            norm_eps: block.norm_eps,
            gate: gate.pointer.cast(),
            selection_bias: selection_bias.pointer,
            gate_up: gate_up.pointer.cast(),
            down: down.pointer.cast(),
            x: x.pointer.cast(),
            logits: logits.pointer,
            topk_ids: topk_ids.pointer,
            topk_weights: topk_weights.pointer,
            out: out.pointer.cast(),
            workspace: workspace.pointer.cast(),
            workspace_bytes: workspace_bytes as u64,
        };
        // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the
        // stream's GPU; what is written is borrowed mutably; the guards in scope outlive the launch.
        launch.end(unsafe { sys::anabranch_moe_block(&raw const params, launch.raw_stream()) })
    }
}
