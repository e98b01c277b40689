//! `qwen2_moe`: Qwen1.5-MoE and Qwen2-57B-A14B. Biases on q, k and v; softmax, then top-k; one shared expert behind a
//! sigmoid gate.

use anabranch::Score;

use super::{Architecture, Base, MAX_WIDTH, attention, attention::GroupedRules, moe, moe::RouterRules, rope};
use crate::{
    Result,
    config::{Moe, MoeNames, QkNorm, SharedExperts, json::Object},
};

pub(super) fn read(object: &Object<'_>, base: &Base) -> Result<Architecture> {
    let rules = GroupedRules {
        rope: rope::half(None),
        default_kv_heads: false,
        window_by_default: false,
        // The published files were written before the field existed, when the biases were always there.
        qkv_bias: object.flag_or("qkv_bias", true)?,
        output_bias: false,
        qk_norm: QkNorm::None,
        clip_qkv: None,
    };
    let attention::Read { attention, rope, softmax_scale } = attention::grouped(object, base, &rules)?;
    let router =
        RouterRules { score: Score::Softmax, renormalize: object.flag("norm_topk_prob")?, scale: 1.0, groups: None };
    Ok(Architecture {
        attention,
        rope,
        softmax_scale,
        layers: moe::layers_by_step(object, base)?,
        intermediate_size: object.size("intermediate_size", 1..=MAX_WIDTH)?,
        mlp_bias: false,
        moe: Some(Moe {
            routing: moe::routing(object, &router)?,
            selection_bias: false,
            intermediate_size: object.size("moe_intermediate_size", 1..=MAX_WIDTH)?,
            shared: Some(SharedExperts {
                intermediate_size: object.size("shared_expert_intermediate_size", 1..=MAX_WIDTH)?,
                gated: true,
            }),
            names: MoeNames { shared: "shared_expert", ..MoeNames::STANDARD },
        }),
        ffn_multiple: None,
    })
}
