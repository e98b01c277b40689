//! The router on the GPU: from logits to expert ids, weights and counts, in one launch.

use super::{Stream, Tensor, View, ViewMut, launch::Launch, launch::Pointer, launch::launched, sys};
use crate::{Adaptive, Error, GroupScore, Renormalize, Result, Routing, Score};

const OPERATION: &str = "router";

/// What the router reads.
#[derive(Debug)]
pub struct RouterInput<'a> {
    /// `[T, E]`: the gate product with the gate's bias already added.
    pub logits: View<'a, f32>,
    /// `[E]`: steers the choice but never the weights (`e_score_correction_bias`).
    pub selection_bias: Option<View<'a, f32>>,
    /// `[T]` in [0, 1], for [`Adaptive::Complexity`] only.
    pub complexity: Option<View<'a, f32>>,
}

/// What the router writes. Nothing that was there is read.
#[derive(Debug)]
pub struct RouterBuffers<'a> {
    /// `[T, K]`, descending by selection score; -1 where a slot is unused or the token was dropped.
    pub topk_ids: ViewMut<'a, i32>,
    /// `[T, K]`; 0 where the id is -1.
    pub topk_weights: ViewMut<'a, f32>,
    /// `[E]`: tokens per expert, dropped ones not counted.
    pub expert_counts: ViewMut<'a, u32>,
}

/// Which experts every token visits, and with what weight: the fields of [`RouterBuffers`], owned.
#[derive(Debug)]
pub struct RouterOutput {
    /// `[T, K]`, descending by selection score; -1 where a slot is unused or the token was dropped.
    pub topk_ids: Tensor<i32>,
    /// `[T, K]`; 0 where the id is -1.
    pub topk_weights: Tensor<f32>,
    /// `[E]`: tokens per expert, dropped ones not counted.
    pub expert_counts: Tensor<u32>,
}

impl RouterOutput {
    /// Memory for the result of `num_tokens` tokens, unset until [`router_into`] writes it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Driver`] for anything else.
    pub fn alloc(stream: &Stream, routing: &Routing, num_tokens: usize) -> Result<Self> {
        let (experts, topk) = (routing.num_experts(), routing.topk());
        Ok(Self {
            topk_ids: Tensor::from_parts(stream.alloc(num_tokens * topk)?, [num_tokens, topk].into()),
            topk_weights: Tensor::from_parts(stream.alloc(num_tokens * topk)?, [num_tokens, topk].into()),
            expert_counts: Tensor::from_parts(stream.alloc(experts)?, [experts].into()),
        })
    }

    /// To write.
    pub fn buffers(&mut self) -> RouterBuffers<'_> {
        RouterBuffers {
            topk_ids: self.topk_ids.view_mut(),
            topk_weights: self.topk_weights.view_mut(),
            expert_counts: self.expert_counts.view_mut(),
        }
    }
}

/// Bytes of workspace that [`router_into`] needs for up to `num_tokens` tokens.
///
/// # Errors
/// [`Error::Launch`] if the kernels refuse the routing.
pub fn router_workspace(routing: &Routing, num_tokens: usize) -> Result<usize> {
    let (routing, mut bytes) = (rule(routing, num_tokens), 0);
    // SAFETY: both point to live values of their types.
    let status = unsafe { sys::anabranch_router_workspace(&raw const routing, num_tokens as u64, &raw mut bytes) };
    launched(OPERATION, status)?;
    Ok(bytes as usize)
}

/// Routes every token into the caller's buffers, as [`reference::router`](crate::reference::router) specifies: the ids are
/// the reference's except where two selection scores differ by a few units in the last place, the weights agree within 1e-6.
///
/// One kernel, and one that clears the counts where the tokens are many; a capacity takes one more. At 16,384 tokens and 256 experts it
/// reads 16.8 MB, which bounds its time.
///
/// # Errors
/// [`Error::Shape`] if a shape does not fit, [`Error::Setting`] if a complexity is missing or given in vain or there are too many
/// tokens, [`Error::Place`] if a tensor is elsewhere, [`Error::Launch`] if CUDA refuses the launch.
pub fn router_into(
    stream: &Stream,
    routing: &Routing,
    input: &RouterInput<'_>,
    workspace: &mut ViewMut<'_, u8>,
    output: &mut RouterBuffers<'_>,
) -> Result<()> {
    let (experts, topk) = (routing.num_experts(), routing.topk());
    let num_tokens = input.logits.shape().sizes()[0];
    check_settings(routing, input, num_tokens)?;

    let launch = Launch::begin(OPERATION, stream)?;
    let logits = launch.read("logits", &input.logits, [num_tokens, experts])?;
    let optional = |argument, view, len: usize| match view {
        Some(view) => launch.read(argument, view, [len]),
        None => Ok(Pointer::null()),
    };
    let selection_bias = optional("selection_bias", input.selection_bias.as_ref(), experts)?;
    let complexity = optional("complexity", input.complexity.as_ref(), num_tokens)?;
    let ids = launch.write("topk_ids", &mut output.topk_ids, [num_tokens, topk])?;
    let weights = launch.write("topk_weights", &mut output.topk_weights, [num_tokens, topk])?;
    let counts = launch.write("expert_counts", &mut output.expert_counts, [experts])?;
    let workspace_bytes = workspace.shape().len();
    let workspace = launch.workspace(workspace, router_workspace(routing, num_tokens)?)?;
    let params = sys::AnabranchRouterParams {
        routing: rule(routing, num_tokens),
        num_tokens: num_tokens as u64,
        logits: logits.pointer,
        selection_bias: selection_bias.pointer,
        complexity: complexity.pointer,
        topk_ids: ids.pointer,
        topk_weights: weights.pointer,
        expert_counts: counts.pointer,
        workspace: workspace.pointer.cast(),
        workspace_bytes: workspace_bytes as u64,
    };
    // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
    // GPU; what is written is borrowed mutably; the guards in scope outlive the launch.
    launch.end(unsafe { sys::anabranch_router(&raw const params, launch.raw_stream()) })
}

/// Routes every token into new memory: [`router_into`] with allocations.
///
/// # Errors
/// Those of [`router_into`], and [`Error::OutOfMemory`].
pub fn router(stream: &Stream, routing: &Routing, input: &RouterInput<'_>) -> Result<RouterOutput> {
    let num_tokens = input.logits.shape().sizes()[0];
    let mut output = RouterOutput::alloc(stream, routing, num_tokens)?;
    let bytes = router_workspace(routing, num_tokens)?;
    let mut workspace = Tensor::from_parts(stream.alloc(bytes)?, [bytes].into());
    router_into(stream, routing, input, &mut workspace.view_mut(), &mut output.buffers())?;
    Ok(output)
}

fn check_settings(routing: &Routing, input: &RouterInput<'_>, num_tokens: usize) -> Result<()> {
    let wanted = routing.adaptive() == Adaptive::Complexity;
    if input.complexity.is_some() != wanted {
        let (expected, got) = if wanted { ("given", "absent") } else { ("absent", "given") };
        return Err(Error::Setting {
            operation: OPERATION,
            setting: "complexity",
            expected: format!("{expected} with Adaptive::{:?}", routing.adaptive()),
            got: got.to_owned(),
        });
    }
    // The kernel counts slots in 31 bits.
    let most = (1_usize << 31) / routing.topk() - 1;
    if num_tokens > most {
        return Err(Error::Setting {
            operation: OPERATION,
            setting: "number of tokens",
            expected: format!("at most {most} with {} slots each", routing.topk()),
            got: num_tokens.to_string(),
        });
    }
    Ok(())
}

/// The routing as the header has it.
pub(super) fn rule(routing: &Routing, num_tokens: usize) -> sys::AnabranchRouting {
    let limit = routing.group_limit();
    sys::AnabranchRouting {
        num_experts: routing.num_experts() as u32,
        topk: routing.topk() as u32,
        score: match routing.score() {
            Score::Softmax => sys::AnabranchScore::ANABRANCH_SCORE_SOFTMAX,
            Score::Sigmoid => sys::AnabranchScore::ANABRANCH_SCORE_SIGMOID,
            Score::TopkSoftmax => sys::AnabranchScore::ANABRANCH_SCORE_TOPK_SOFTMAX,
        },
        renormalize: match routing.renormalize() {
            Renormalize::None => sys::AnabranchRenormalize::ANABRANCH_RENORMALIZE_NONE,
            Renormalize::Sum => sys::AnabranchRenormalize::ANABRANCH_RENORMALIZE_SUM,
        },
        scale: routing.scale(),
        n_group: limit.map_or(0, |limit| limit.n_group as u32),
        topk_group: limit.map_or(0, |limit| limit.topk_group as u32),
        group_score: match limit.map_or(GroupScore::Max, |limit| limit.score) {
            GroupScore::Max => sys::AnabranchGroupScore::ANABRANCH_GROUP_SCORE_MAX,
            GroupScore::Top2Sum => sys::AnabranchGroupScore::ANABRANCH_GROUP_SCORE_TOP2_SUM,
        },
        adaptive: match routing.adaptive() {
            Adaptive::Fixed => sys::AnabranchAdaptive::ANABRANCH_ADAPTIVE_FIXED,
            Adaptive::Complexity => sys::AnabranchAdaptive::ANABRANCH_ADAPTIVE_COMPLEXITY,
            Adaptive::Entropy => sys::AnabranchAdaptive::ANABRANCH_ADAPTIVE_ENTROPY,
        },
        expert_capacity: routing.expert_capacity(num_tokens).unwrap_or(0) as u64,
    }
}
