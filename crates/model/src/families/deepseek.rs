//! `deepseek`: DeepSeekMoE (arXiv 2401.06066). LLaMA's attention; softmax, then top-k, not renormalised (eq. 9-11);
//! shared experts of weight 1.

use anabranch::Score;

use super::{Architecture, Base, MAX_WIDTH, attention, attention::GroupedRules, moe, moe::RouterRules, rope};
use crate::{
    Result,
    config::{Moe, MoeNames, QkNorm, json::Object},
};

pub(super) fn read(object: &Object<'_>, base: &Base) -> Result<Architecture> {
    object.expect_text("scoring_func", &["softmax"])?;
    let bias = object.flag_or("attention_bias", false)?;
    let rules = GroupedRules {
        rope: rope::half(Some(1e4)),
        default_kv_heads: true,
        window_by_default: true,
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::None,
        clip_qkv: None,
    };
    let attention::Read { attention, rope, softmax_scale } = attention::grouped(object, base, &rules)?;
    let width = object.size("moe_intermediate_size", 1..=MAX_WIDTH)?;
    let router = RouterRules {
        score: Score::Softmax,
        renormalize: object.flag_or("norm_topk_prob", false)?,
        scale: 1.0,
        groups: None,
    };
    Ok(Architecture {
        attention,
        rope,
        softmax_scale,
        layers: moe::layers_after_first(object, base)?,
        intermediate_size: object.size("intermediate_size", 1..=MAX_WIDTH)?,
        mlp_bias: false,
        moe: Some(Moe {
            routing: moe::routing(object, &router)?,
            selection_bias: false,
            intermediate_size: width,
            shared: moe::shared(object, width)?,
            names: MoeNames::STANDARD,
        }),
        // 0.25 * 8d/3 = 1365.3 is stored as 1408, 2 * 8d/3 = 10922.7 as 10944.
        ffn_multiple: Some(64),
    })
}
