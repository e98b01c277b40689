//! A whole MoE layer.

use super::{Expert, Linear, Permutation, Real, RouterOutput, combine, expert_forward, grouped_gemm, linear, router};
use crate::{Result, Routing};

/// The shared experts of a layer, stored as one wide expert (their sum is the same).
#[derive(Debug, Clone, Copy)]
pub struct SharedExpert<'a> {
    /// Their weights.
    pub expert: Expert<'a>,
    /// `[1, d]`: if present, the output is scaled by `sigmoid(gate(x))` (Qwen2-MoE's `shared_expert_gate`).
    pub gate: Option<Linear<'a>>,
}

/// A layer's weights.
///
/// ```text
/// out[t] = sum_k topk_weights[t, k] * expert_{topk_ids[t, k]}(x[t]) + shared(x[t])      DeepSeekMoE, eq. 9
/// ```
#[derive(Debug, Clone)]
pub struct MoeLayer<'a> {
    /// The router's rule.
    pub routing: Routing,
    /// The gate `[E, d]`, perhaps with a bias `[E]` of its own, which is part of the logits.
    pub gate: Linear<'a>,
    /// `[E]`: steers the choice, never the weights.
    pub selection_bias: Option<&'a [f32]>,
    /// The routed experts, E of them.
    pub experts: Vec<Expert<'a>>,
    /// The shared experts.
    pub shared: Option<SharedExpert<'a>>,
}

/// What a layer did.
#[derive(Debug, Clone)]
pub struct MoeOutput<T> {
    /// `[T, d]`.
    pub y: Vec<T>,
    /// `[T, E]`.
    pub logits: Vec<T>,
    /// The experts that were chosen.
    pub routing: RouterOutput<T>,
}

impl MoeLayer<'_> {
    /// Runs the layer on `x` `[T, d]`; `complexity` `[T]` for [`crate::Adaptive::Complexity`] only.
    ///
    /// # Errors
    /// Those of its operations: lengths that do not fit, a complexity that is missing or given in vain.
    pub fn forward<T: Real>(&self, x: &[T], complexity: Option<&[f32]>) -> Result<MoeOutput<T>> {
        let hidden_size = self.gate.weight.columns();
        let num_tokens = x.len().checked_div(hidden_size).unwrap_or(0);
        let logits = linear(x, num_tokens, &self.gate)?;
        let routing = router(&self.routing, &logits, self.selection_bias, complexity)?;
        let y = self.forward_routed(x, &routing)?;
        Ok(MoeOutput { y, logits, routing })
    }

    /// Runs the experts on `x` `[T, d]` with a routing made elsewhere.
    ///
    /// # Errors
    /// If the routing or the weights do not fit `x`.
    pub fn forward_routed<T: Real>(&self, x: &[T], routing: &RouterOutput<T>) -> Result<Vec<T>> {
        let hidden_size = self.gate.weight.columns();
        let permutation = Permutation::new(&routing.topk_ids, self.routing.topk(), self.routing.num_experts())?;
        let y = grouped_gemm(x, hidden_size, &self.experts, &permutation)?;
        let mut out = combine(&y, &routing.topk_weights, &permutation, hidden_size)?;
        if let Some(shared) = &self.shared {
            let mut y = expert_forward(x, permutation.num_tokens(), &shared.expert)?;
            if let Some(gate) = &shared.gate {
                let gate = linear(x, permutation.num_tokens(), gate)?;
                for (y, gate) in y.chunks_exact_mut(hidden_size.max(1)).zip(gate) {
                    let gate = T::ONE / (T::ONE + (-gate).exp());
                    y.iter_mut().for_each(|y| *y *= gate);
                }
            }
            out.iter_mut().zip(y).for_each(|(out, y)| *out += y);
        }
        Ok(out)
    }
}
