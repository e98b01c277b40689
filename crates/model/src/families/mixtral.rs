//! `mixtral`: Mixtral-8x7B and 8x22B. Softmax, then top-k, renormalised; weights of its own names.

use anabranch::Score;

use super::{Architecture, Base, MAX_WIDTH, attention, attention::GroupedRules, moe, moe::RouterRules, rope};
use crate::{
    Result,
    config::{FeedForward, Moe, MoeNames, QkNorm, json::Object},
};

pub(super) fn read(object: &Object<'_>, base: &Base) -> Result<Architecture> {
    let rules = GroupedRules {
        rope: rope::half(Some(1e6)),
        default_kv_heads: false,
        window_by_default: true,
        qkv_bias: false,
        output_bias: false,
        qk_norm: QkNorm::None,
        clip_qkv: None,
    };
    let attention::Read { attention, rope, softmax_scale } = attention::grouped(object, base, &rules)?;
    let width = object.size("intermediate_size", 1..=MAX_WIDTH)?;
    let router = RouterRules { score: Score::Softmax, renormalize: true, scale: 1.0, groups: None };
    Ok(Architecture {
        attention,
        rope,
        softmax_scale,
        layers: vec![FeedForward::Moe; base.num_layers],
        intermediate_size: width,
        mlp_bias: false,
        moe: Some(Moe {
            routing: moe::routing(object, &router)?,
            selection_bias: false,
            intermediate_size: width,
            shared: None,
            // w1 is the gate and w3 the up projection; w2 goes down.
            names: MoeNames { module: "block_sparse_moe", expert: ["w1", "w3", "w2"], shared: "shared_experts" },
        }),
        ffn_multiple: None,
    })
}
