//! `qwen3_moe`: Qwen3-30B-A3B and Qwen3-235B-A22B. Norms of each query and key head; softmax, then top-k.

use anabranch::Score;

use super::{Architecture, Base, MAX_WIDTH, attention, attention::GroupedRules, moe, moe::RouterRules, rope};
use crate::{
    Result,
    config::{Moe, MoeNames, QkNorm, json::Object},
};

pub(super) fn read(object: &Object<'_>, base: &Base) -> Result<Architecture> {
    let bias = object.flag_or("attention_bias", false)?;
    let rules = GroupedRules {
        rope: rope::half(None),
        default_kv_heads: false,
        window_by_default: false,
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::PerHead,
        clip_qkv: None,
    };
    let attention::Read { attention, rope, softmax_scale } = attention::grouped(object, base, &rules)?;
    let router = RouterRules {
        score: Score::Softmax,
        // Transformers' own default is false, every published file says true: not guessed.
        renormalize: object.flag("norm_topk_prob")?,
        scale: 1.0,
        groups: None,
    };
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
            shared: None,
            names: MoeNames::STANDARD,
        }),
        ffn_multiple: None,
    })
}
