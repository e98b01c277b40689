//! The launchers and workspace queries: straight to the kernels. Only where they refuse is it found out which argument is
//! meant, so that a call that is accepted costs nothing more.

use anabranch::cuda::sys::{
    self, AnabranchMoePlan, AnabranchMoeShape, AnabranchRouting, AnabranchStatus, AnabranchStream,
};

use crate::{
    declared,
    report::{Refusal, guard, needed},
    routing::routing,
};

/// A pointer of a structure, for the words of a refusal.
pub(crate) struct Argument {
    pub(crate) name: &'static str,
    pub(crate) address: usize,
    /// Bytes that it must be aligned to.
    pub(crate) alignment: usize,
    /// Whether it may not be null.
    pub(crate) needed: bool,
}

/// A kernel's status, with the names of the pointers at fault.
pub(crate) fn explained(status: AnabranchStatus, arguments: &[Argument]) -> Result<(), Refusal> {
    let named = |at_fault: &dyn Fn(&Argument) -> bool| {
        arguments.iter().filter(|argument| at_fault(argument)).map(|argument| argument.name).collect::<Vec<_>>()
    };
    match status {
        AnabranchStatus::ANABRANCH_STATUS_OK => Ok(()),
        AnabranchStatus::ANABRANCH_STATUS_POINTER => {
            let null = named(&|argument| argument.needed && argument.address == 0);
            if null.is_empty() {
                return Err(Refusal::of_status(status));
            }
            Err(Refusal::pointer(format_args!("{} must not be null", null.join(", "))))
        }
        AnabranchStatus::ANABRANCH_STATUS_ALIGNMENT => {
            let askew = arguments.iter().filter(|argument| argument.address % argument.alignment != 0);
            let askew = askew.map(|argument| format!("{} to {}", argument.name, argument.alignment));
            let askew = askew.collect::<Vec<_>>();
            if askew.is_empty() {
                return Err(Refusal::of_status(status));
            }
            Err(Refusal::new(status, format_args!("must be aligned: {} bytes", askew.join(", "))))
        }
        _ => Err(Refusal::of_status(status)),
    }
}

/// A launcher: its structure's pointers that must be given and those that may be, each with its alignment, and what
/// finds a wrong setting.
macro_rules! launcher {
    (
        $name:ident($params:ident), needs [$($need:ident: $need_align:literal),*],
        may [$($may:ident: $may_align:literal),*] $(, settings $settings:expr)?
    ) => {
        declared!($name(*const sys::$params, AnabranchStream) -> AnabranchStatus);

        #[doc = concat!("`", stringify!($name), "` of the header.")]
        ///
        /// # Safety
        /// `params` is null or points to the structure; its pointers are as the header says.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(params: *const sys::$params, stream: AnabranchStream) -> AnabranchStatus {
            guard(stringify!($name), || {
                needed(params, "params")?;
                // SAFETY: the caller vouches for what lies behind the pointers.
                let status = unsafe { sys::$name(params, stream) };
                if status == AnabranchStatus::ANABRANCH_STATUS_OK {
                    return Ok(());
                }
                // SAFETY: it is neither null nor askew, and the caller vouches for the rest.
                let params = unsafe { &*params };
                $(if status == AnabranchStatus::ANABRANCH_STATUS_SETTING {
                    let check: fn(&sys::$params) -> Result<(), Refusal> = $settings;
                    check(params)?;
                })?
                explained(status, &[
                    $(Argument { name: stringify!($need), address: params.$need.addr(), alignment: $need_align, needed: true },)*
                    $(Argument { name: stringify!($may), address: params.$may.addr(), alignment: $may_align, needed: false },)*
                ])
            })
        }
    };
}

launcher!(
    anabranch_router(AnabranchRouterParams),
    needs [logits: 4, topk_ids: 4, topk_weights: 4, expert_counts: 4],
    may [selection_bias: 4, complexity: 4, workspace: 4],
    settings |params| routing(&params.routing).map(drop)
);
launcher!(anabranch_router_logits(AnabranchRouterLogitsParams), needs [x: 16, gate: 16, logits: 4], may [bias: 4]);
launcher!(
    anabranch_permute(AnabranchPermuteParams),
    needs [topk_ids: 4, expert_offsets: 4, slots: 4, inverse: 4],
    may [workspace: 4]
);
launcher!(anabranch_permute_rows(AnabranchPermuteRowsParams), needs [x: 16, slots: 4, out: 16], may []);
launcher!(
    anabranch_combine(AnabranchCombineParams),
    needs [y: 16, inverse: 4, topk_weights: 4, out: 16],
    may [shared: 16, shared_gate: 4]
);
launcher!(anabranch_rms_norm(AnabranchRmsNormParams), needs [x: 16, weight: 16, out: 16], may [delta: 16]);
launcher!(
    anabranch_rope(AnabranchRopeParams),
    needs [frequencies: 4, positions: 4],
    may [cache_rows: 4, k_cache: 16, v_cache: 16]
);
launcher!(anabranch_embedding(AnabranchEmbeddingParams), needs [table: 16, ids: 4, out: 16], may []);
launcher!(anabranch_add(AnabranchAddParams), needs [x: 2, y: 2], may []);
launcher!(anabranch_argmax(AnabranchArgmaxParams), needs [logits: 2, ids: 4, workspace: 8], may []);
launcher!(anabranch_sample(AnabranchSampleParams), needs [logits: 2, rows: 8, ids: 4], may [seen: 4]);
launcher!(
    anabranch_grouped_gemm(AnabranchGroupedGemmParams),
    needs [x: 16, weights: 16, y: 16],
    may [bias: 8, expert_offsets: 4, row_slots: 4]
);
launcher!(
    anabranch_linear(AnabranchLinearParams),
    needs [x: 16, weights: 16, y: 4],
    may [bias: 4, norm_weight: 16, delta: 16, sum: 16]
);
launcher!(
    anabranch_attention(AnabranchAttentionParams),
    needs [q: 16, keys: 16, values: 16, q_offsets: 4, kv_lengths: 4, block_table: 4, table_starts: 4, out: 16],
    may [workspace: 16]
);
launcher!(anabranch_random(AnabranchRandomParams), needs [out: 16], may []);
launcher!(anabranch_checksum(AnabranchChecksumParams), needs [x: 16, out: 4], may []);
launcher!(
    anabranch_moe_layer(AnabranchMoeLayerParams),
    needs [x: 16, gate_up: 16, down: 16, out: 16, workspace: 256],
    may [logits: 4, selection_bias: 4, shared_gate: 4, topk_ids: 4, topk_weights: 4],
    settings |params| routing(&params.shape.routing).map(drop)
);

launcher!(
    anabranch_moe_block(AnabranchMoeBlockParams),
    needs [residual: 16, norm_weight: 16, gate: 16, gate_up: 16, down: 16, x: 16, logits: 16, out: 16, workspace: 256],
    may [delta: 16, selection_bias: 4, topk_ids: 4, topk_weights: 4],
    settings |params| routing(&params.shape.routing).map(drop)
);

launcher!(
    anabranch_decode_step(AnabranchDecodeStepParams),
    needs [
        layers: 8, position: 4, cache_row: 4, kv_length: 4, table_start: 4, block_table: 4, x: 16, workspace: 256
    ],
    may [frequencies: 4],
    settings |params| decode_routing(&params.shape)
);

/// The rule of a model whose layers have experts.
fn decode_routing(shape: &sys::AnabranchDecodeShape) -> Result<(), Refusal> {
    if shape.routing.num_experts == 0 { Ok(()) } else { routing(&shape.routing).map(drop) }
}

/// A query: host pointers that must be given, and what validates the settings, which need not be quick here.
macro_rules! query {
    (
        $name:ident($($argument:ident: $type:ty),*), needs [$($need:ident),*] $(, settings $settings:expr)?
    ) => {
        declared!($name($($type),*) -> AnabranchStatus);

        #[doc = concat!("`", stringify!($name), "` of the header.")]
        ///
        /// # Safety
        /// The pointers are null or point to values of their types.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($argument: $type),*) -> AnabranchStatus {
            guard(stringify!($name), || {
                $(needed($need, stringify!($need))?;)*
                $($settings?;)?
                // SAFETY: the pointers are neither null nor askew, and the caller vouches for the rest.
                let status = unsafe { sys::$name($($argument),*) };
                explained(status, &[])
            })
        }
    };
}

query!(
    anabranch_router_workspace(routing: *const AnabranchRouting, num_tokens: u64, bytes: *mut u64),
    needs [routing, bytes],
    // SAFETY: checked just before.
    settings crate::routing::routing(unsafe { &*routing }).map(drop)
);
query!(
    anabranch_permute_workspace(num_tokens: u64, topk: u32, num_experts: u32, bytes: *mut u64),
    needs [bytes]
);
query!(
    anabranch_linear_takes(num_tokens: u64, in_features: u32, weight_rows: u64, norms: u32, takes: *mut u32),
    needs [takes]
);
query!(anabranch_argmax_workspace(num_rows: u64, vocab_size: u64, bytes: *mut u64), needs [bytes]);
query!(
    anabranch_attention_workspace(params: *const sys::AnabranchAttentionParams, bytes: *mut u64),
    needs [params, bytes]
);
query!(
    anabranch_decode_step_takes(shape: *const sys::AnabranchDecodeShape, takes: *mut u32, bytes: *mut u64),
    needs [shape, takes, bytes],
    // SAFETY: checked just before.
    settings decode_routing(unsafe { &*shape })
);
query!(
    anabranch_moe_plan(shape: *const AnabranchMoeShape, num_tokens: u64, plan: *mut AnabranchMoePlan),
    needs [shape, plan],
    // SAFETY: checked just before.
    settings routing(unsafe { &(*shape).routing }).map(drop)
);

#[cfg(test)]
mod tests {
    use super::{Argument, explained};
    use crate::report::Refusal;
    use anabranch::cuda::sys::AnabranchStatus;

    #[test]
    fn the_arguments_at_fault_are_named() {
        let argument = |name, address, needed| Argument { name, address, alignment: 16, needed };
        let arguments = [argument("x", 0, true), argument("bias", 0, false), argument("out", 24, true)];
        let why = |status| explained(status, &arguments).map_err(|refusal| format!("{refusal:?}")).unwrap_err();
        assert!(why(AnabranchStatus::ANABRANCH_STATUS_POINTER).contains("\"x must not be null\""));
        assert!(why(AnabranchStatus::ANABRANCH_STATUS_ALIGNMENT).contains("\"must be aligned: out to 16 bytes\""));
        let plain = format!("{:?}", Refusal::of_status(AnabranchStatus::ANABRANCH_STATUS_WORKSPACE));
        assert_eq!(why(AnabranchStatus::ANABRANCH_STATUS_WORKSPACE), plain);
        assert!(explained(AnabranchStatus::ANABRANCH_STATUS_OK, &arguments).is_ok());
    }
}
