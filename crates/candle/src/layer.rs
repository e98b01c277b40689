//! The layer.

use std::sync::{Arc, Mutex, PoisonError};

use anabranch::{
    Routing,
    cuda::{Arch, Device, MoeInput, MoeLayer, MoeRouting, MoeShape, Stream, ViewMut},
};
use candle_core::{CudaStorage, DType, Result, Storage, Tensor, op::BackpropOp};
use half::bf16;

use crate::tensors::{hold, wrapped};

/// Plans that are kept beside a layer's weights: numbers of tokens, rounded up to powers of two, are few.
const MOST_PLANS: usize = 32;

/// The weights of a layer's experts. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Experts {
    gate_up: Tensor,
    down: Tensor,
    selection_bias: Option<Tensor>,
    num_shared: usize,
    plans: Arc<Mutex<Vec<MoeLayer>>>,
}

impl Experts {
    /// Takes `gate_up` `[E, 2 n, d]` (gate rows, then up rows of each expert) and `down` `[E, d, n]`, bf16; d and n are
    /// multiples of 8. Nothing is copied.
    ///
    /// # Errors
    /// If the shapes contradict each other.
    pub fn new(gate_up: Tensor, down: Tensor) -> Result<Self> {
        let (experts, hidden, width) = down.dims3()?;
        if gate_up.dims() != [experts, 2 * width, hidden] {
            let expected = [experts, 2 * width, hidden];
            candle_core::bail!("gate_up must have shape {expected:?} beside this down, got {:?}", gate_up.dims());
        }
        Ok(Self { gate_up, down, selection_bias: None, num_shared: 0, plans: Arc::default() })
    }

    /// The last `num_shared` experts are visited by every token, with weight 1.
    #[must_use]
    pub fn with_shared(mut self, num_shared: usize) -> Self {
        self.num_shared = num_shared;
        self
    }

    /// `[E]` f32: steers the router's choice but never the weights (`DeepSeek`-V3's `e_score_correction_bias`).
    #[must_use]
    pub fn with_selection_bias(mut self, bias: Tensor) -> Self {
        self.selection_bias = Some(bias);
        self
    }

    /// The plan for this many tokens, made once.
    fn plan(&self, device: &Device, routing: &Routing, num_tokens: usize) -> anabranch::Result<MoeLayer> {
        let (_, hidden_size, intermediate_size) = self.down.dims3().unwrap_or_default();
        let shape = MoeShape { routing: *routing, hidden_size, intermediate_size, num_shared: self.num_shared };
        let most_tokens = num_tokens.next_power_of_two();
        // A panic while the lock was held left the list whole: plans are pushed at once.
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.iter().find(|plan| plan.most_tokens() == most_tokens && *plan.shape() == shape) {
            return Ok(plan.clone());
        }
        let plan = MoeLayer::plan(device, &shape, most_tokens, Arch::Auto)?;
        if plans.len() == MOST_PLANS {
            plans.remove(0);
        }
        plans.push(plan.clone());
        Ok(plan)
    }
}

/// A layer from its router's logits: `x` `[T, d]` bf16 and `logits` `[T, E]` f32 to `[T, d]` bf16, on x's device and stream.
///
/// ```text
/// out[t] = sum_k topk_weights[t, k] E_k(x[t]) + sum_s S_s(x[t])      E(x) = (silu(x W_gate^T) * (x W_up^T)) W_down^T
/// ```
///
/// The output and a workspace are allocated on the stream; nothing is copied and nothing waits. The same call gives the
/// same bits.
///
/// # Errors
/// If a tensor has another data type, shape, device or order than this, the routing another number of experts, or x is
/// not on a CUDA device. Nothing is launched then.
pub fn moe_forward(x: &Tensor, logits: &Tensor, experts: &Experts, routing: &Routing) -> Result<Tensor> {
    let candle_core::Device::Cuda(device) = x.device() else {
        candle_core::bail!("x must be on a CUDA device, got {:?}", x.device().location());
    };
    let (num_tokens, hidden_size) = x.dims2()?;
    let stream = Stream::from_cudarc(device.cuda_stream()).map_err(wrapped)?;
    let held_x = hold("x", x, DType::BF16, x.device())?;
    let held_logits = hold("logits", logits, DType::F32, x.device())?;
    let gate_up = hold("gate_up", &experts.gate_up, DType::BF16, x.device())?;
    let down = hold("down", &experts.down, DType::BF16, x.device())?;
    let bias = experts.selection_bias.as_ref();
    let bias = bias.map(|bias| hold("selection_bias", bias, DType::F32, x.device())).transpose()?;
    if num_tokens == 0 {
        return Tensor::zeros((0, hidden_size), DType::BF16, x.device());
    }

    let plan = experts.plan(stream.device(), routing, num_tokens).map_err(wrapped)?;
    // SAFETY: the layer writes all of the output, and reads of the workspace only what it wrote there.
    let (mut out, mut workspace) =
        unsafe { (device.alloc::<bf16>(num_tokens * hidden_size)?, device.alloc::<u8>(plan.workspace_bytes())?) };
    let input = MoeInput {
        x: held_x.view()?,
        routing: MoeRouting::Logits {
            logits: held_logits.view()?,
            selection_bias: bias.as_ref().map(crate::tensors::Held::view).transpose()?,
        },
        shared_gate: None,
        gate_up: gate_up.view()?,
        down: down.view()?,
    };
    let mut workspace = ViewMut::new(workspace.slice_mut(..), [plan.workspace_bytes()]).map_err(wrapped)?;
    let output = ViewMut::new(out.slice_mut(..), [num_tokens, hidden_size]).map_err(wrapped)?;
    plan.forward_into(&stream, &input, &mut workspace, &mut output.into()).map_err(wrapped)?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device.clone()));
    Ok(Tensor::from_storage(storage, (num_tokens, hidden_size), BackpropOp::none(), false))
}
