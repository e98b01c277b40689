//! Plans: [`MoeLayer`] behind a handle, run on the caller's pointers.

use std::{ffi::c_char, ptr};

use anabranch::{
    Adaptive, Error,
    cuda::{
        Arch, Device, MoeLayer, MoeShape,
        cudarc::driver::sys::{CUcontext, cuCtxGetCurrent, cuCtxSetCurrent},
        sys::{
            self, AnabranchArch, AnabranchForwardParams, AnabranchMoeLayerParams, AnabranchMoeShape, AnabranchPlan,
            AnabranchStatus, AnabranchStream,
        },
    },
};

use crate::{
    declared,
    launchers::{Argument, explained},
    report::{Refusal, guard, needed},
    routing::routing,
    runtime::{check_memory, check_stream, current_device, place},
};

/// What a handle points to. Nothing of it changes once made, so that threads may share it.
struct Plan {
    layer: MoeLayer,
    /// As the launcher takes it, with the path that was chosen.
    shape: AnabranchMoeShape,
    device: i32,
}

impl Plan {
    fn new(shape: &AnabranchMoeShape, most_tokens: u64) -> Result<Self, Refusal> {
        let arch = match shape.arch {
            AnabranchArch::ANABRANCH_ARCH_AUTO => Arch::Auto,
            AnabranchArch::ANABRANCH_ARCH_SM80 => Arch::Sm80,
            AnabranchArch::ANABRANCH_ARCH_SM90 => Arch::Sm90,
            AnabranchArch(other) => {
                let why = format!("arch must be a value of AnabranchArch, got {other}");
                return Err(Refusal::new(AnabranchStatus::ANABRANCH_STATUS_UNSUPPORTED, why));
            }
        };
        let validated = MoeShape {
            routing: routing(&shape.routing)?,
            hidden_size: shape.hidden_size as usize,
            intermediate_size: shape.intermediate_size as usize,
            num_shared: shape.num_shared as usize,
        };
        let most_tokens = usize::try_from(most_tokens).unwrap_or(usize::MAX);
        // Says in words that there is no driver, before anything asks it.
        Device::count()?;
        let device = current_device()?;
        let layer = keeping_context(|| {
            MoeLayer::plan(&Device::open(device.unsigned_abs() as usize)?, &validated, most_tokens, arch)
        })?;
        let chosen = match layer.describe().arch {
            Arch::Sm90 => AnabranchArch::ANABRANCH_ARCH_SM90,
            _ => AnabranchArch::ANABRANCH_ARCH_SM80,
        };
        Ok(Self { layer, shape: AnabranchMoeShape { arch: chosen, ..*shape }, device })
    }

    fn forward(&self, call: &AnabranchForwardParams, stream: AnabranchStream) -> Result<(), Refusal> {
        let most = self.layer.most_tokens() as u64;
        if call.num_tokens > most {
            let why = format!("num_tokens must be at most {most}, as planned, got {}", call.num_tokens);
            return Err(Refusal::setting(why));
        }
        let routed = !call.logits.is_null();
        if routed && self.layer.shape().routing.adaptive() == Adaptive::Complexity {
            let why = "logits must be null with a routing by complexity: run anabranch_router with it first";
            return Err(Refusal::pointer(why));
        }
        if !call.shared_gate.is_null() && self.shape.num_shared == 0 {
            return Err(Refusal::pointer("shared_gate must be null without shared experts"));
        }
        let current = current_device()?;
        if current != self.device {
            let why = format!("the plan was made for GPU {}, but GPU {current} is current", self.device);
            return Err(place(why));
        }
        check_stream(stream, self.device)?;
        let arguments = arguments(call);
        if call.check_memory != 0 && call.num_tokens > 0 {
            for argument in arguments.iter().filter(|argument| argument.address != 0) {
                check_memory(argument.name, ptr::without_provenance(argument.address), self.device)?;
            }
        }
        let params = AnabranchMoeLayerParams {
            shape: self.shape,
            num_tokens: call.num_tokens,
            x: call.x,
            logits: call.logits,
            selection_bias: call.selection_bias,
            shared_gate: call.shared_gate,
            gate_up: call.gate_up,
            down: call.down,
            topk_ids: call.topk_ids,
            topk_weights: call.topk_weights,
            out: call.out,
            workspace: call.workspace,
            workspace_bytes: call.workspace_bytes,
        };
        // SAFETY: the caller vouches for what lies behind the pointers, as the header says.
        let status = unsafe { sys::anabranch_moe_layer(&raw const params, stream) };
        if status == AnabranchStatus::ANABRANCH_STATUS_WORKSPACE {
            let why = format!(
                "workspace_bytes must be what anabranch_plan_workspace answers for {} tokens, {} at least, got {}",
                call.num_tokens,
                self.workspace_bytes(call.num_tokens)?,
                call.workspace_bytes
            );
            return Err(Refusal::new(status, why));
        }
        explained(status, &arguments)
    }

    fn workspace_bytes(&self, num_tokens: u64) -> Result<u64, Refusal> {
        Ok(self.describe(num_tokens)?.workspace_bytes as u64)
    }

    fn describe(&self, num_tokens: u64) -> Result<anabranch::cuda::MoePlan, Refusal> {
        let num_tokens = usize::try_from(num_tokens).unwrap_or(usize::MAX);
        keeping_context(|| self.layer.describe_for(num_tokens)).map_err(Refusal::from)
    }
}

/// The pointers of a call. Ids and weights are needed where there are no logits.
fn arguments(call: &AnabranchForwardParams) -> [Argument; 10] {
    let argument = |name, address, alignment, needed| Argument { name, address, alignment, needed };
    let given = call.logits.is_null();
    [
        argument("x", call.x.addr(), 16, true),
        argument("logits", call.logits.addr(), 4, false),
        argument("selection_bias", call.selection_bias.addr(), 4, false),
        argument("shared_gate", call.shared_gate.addr(), 4, false),
        argument("gate_up", call.gate_up.addr(), 16, true),
        argument("down", call.down.addr(), 16, true),
        argument("topk_ids", call.topk_ids.addr(), 4, given),
        argument("topk_weights", call.topk_weights.addr(), 4, given),
        argument("out", call.out.addr(), 16, true),
        argument("workspace", call.workspace.addr(), 256, true),
    ]
}

/// Opening a GPU and asking for its facts makes its primary context current; the caller's own comes back afterwards. The
/// driver is known to be there.
fn keeping_context<T>(ask: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let mut context: CUcontext = ptr::null_mut();
    // SAFETY: it writes one handle.
    let got = unsafe { cuCtxGetCurrent(&raw mut context) };
    let answer = ask();
    if got.result().is_ok() {
        // SAFETY: the handle was current just before, or is null for none.
        let _ = unsafe { cuCtxSetCurrent(context) };
    }
    answer
}

/// A handle's plan.
///
/// # Safety
/// It is null, or was made by [`anabranch_plan_create`] and not destroyed.
unsafe fn plan_of<'a>(plan: *const AnabranchPlan) -> Result<&'a Plan, Refusal> {
    let plan = plan.cast::<Plan>();
    needed(plan, "plan")?;
    // SAFETY: the caller's promise.
    Ok(unsafe { &*plan })
}

declared!(anabranch_plan_create(*const AnabranchMoeShape, u64, *mut *mut AnabranchPlan) -> AnabranchStatus);

/// `anabranch_plan_create` of the header. Where it refuses, `*plan` is null.
///
/// # Safety
/// The pointers are null or point to values of their types.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn anabranch_plan_create(
    shape: *const AnabranchMoeShape,
    most_tokens: u64,
    plan: *mut *mut AnabranchPlan,
) -> AnabranchStatus {
    guard("anabranch_plan_create", || {
        needed(plan, "plan")?;
        // SAFETY: checked just before; so is the shape below.
        unsafe { *plan = ptr::null_mut() };
        needed(shape, "shape")?;
        // SAFETY: as above.
        let made = Plan::new(unsafe { &*shape }, most_tokens)?;
        // SAFETY: as above.
        unsafe { *plan = Box::into_raw(Box::new(made)).cast() };
        Ok(())
    })
}

declared!(anabranch_plan_destroy(*mut AnabranchPlan));

/// `anabranch_plan_destroy` of the header.
///
/// # Safety
/// The plan is null, or was made by [`anabranch_plan_create`], is destroyed once and not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn anabranch_plan_destroy(plan: *mut AnabranchPlan) {
    guard("anabranch_plan_destroy", || {
        if !plan.is_null() {
            // SAFETY: the caller's promise: it came from `Box::into_raw`.
            drop(unsafe { Box::from_raw(plan.cast::<Plan>()) });
        }
        Ok(())
    });
}

declared!(anabranch_plan_workspace(*const AnabranchPlan, u64, *mut u64) -> AnabranchStatus);

/// `anabranch_plan_workspace` of the header.
///
/// # Safety
/// The plan is null or live; `bytes` is null or points to a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn anabranch_plan_workspace(
    plan: *const AnabranchPlan,
    num_tokens: u64,
    bytes: *mut u64,
) -> AnabranchStatus {
    guard("anabranch_plan_workspace", || {
        // SAFETY: the caller's promise.
        let plan = unsafe { plan_of(plan) }?;
        needed(bytes, "bytes")?;
        let answer = plan.workspace_bytes(num_tokens)?;
        // SAFETY: checked just before.
        unsafe { *bytes = answer };
        Ok(())
    })
}

declared!(anabranch_plan_describe(*const AnabranchPlan, u64, *mut c_char, u64) -> AnabranchStatus);

/// `anabranch_plan_describe` of the header.
///
/// # Safety
/// The plan is null or live; `text` is null or has `text_bytes` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn anabranch_plan_describe(
    plan: *const AnabranchPlan,
    num_tokens: u64,
    text: *mut c_char,
    text_bytes: u64,
) -> AnabranchStatus {
    guard("anabranch_plan_describe", || {
        // SAFETY: the caller's promise.
        let plan = unsafe { plan_of(plan) }?;
        needed(text, "text")?;
        if text_bytes == 0 {
            return Err(Refusal::setting("text_bytes must be at least 1"));
        }
        let words = plan.describe(num_tokens)?.to_string();
        let length = words.len().min(usize::try_from(text_bytes).unwrap_or(usize::MAX) - 1);
        // SAFETY: the buffer has room for `length` bytes and the zero; the words are elsewhere, and they are ASCII, so
        // that they may be cut anywhere.
        unsafe {
            ptr::copy_nonoverlapping(words.as_ptr().cast(), text, length);
            *text.add(length) = 0;
        }
        Ok(())
    })
}

declared!(
    anabranch_plan_forward(*const AnabranchPlan, *const AnabranchForwardParams, AnabranchStream) -> AnabranchStatus
);

/// `anabranch_plan_forward` of the header.
///
/// # Safety
/// The plan is null or live; `params` is null or points to the structure, and its pointers are as the header says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn anabranch_plan_forward(
    plan: *const AnabranchPlan,
    params: *const AnabranchForwardParams,
    stream: AnabranchStream,
) -> AnabranchStatus {
    guard("anabranch_plan_forward", || {
        // SAFETY: the caller's promise.
        let plan = unsafe { plan_of(plan) }?;
        needed(params, "params")?;
        // SAFETY: checked just before.
        plan.forward(unsafe { &*params }, stream)
    })
}
