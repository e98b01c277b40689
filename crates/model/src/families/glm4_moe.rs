//! `glm4_moe`: GLM-4.5 and GLM-4.5-Air. Grouped-query attention whose q, k and v may have biases, half of each head
//! rotated; DeepSeek-V3's router. Multi-token-prediction layers are not part of the main model.

use anabranch::{GroupScore, RopeLayout, Score};

use super::{Architecture, Base, MAX_WIDTH, attention, attention::GroupedRules, moe, moe::RouterRules, rope};
use crate::{
    Result,
    config::{Moe, MoeNames, QkNorm, json::Object},
};

pub(super) fn read(object: &Object<'_>, base: &Base) -> Result<Architecture> {
    object.expect_text("scoring_func", &["sigmoid"])?;
    let rules = GroupedRules {
        rope: rope::Rules { layout: RopeLayout::Half, default_theta: None, default_partial: Some(0.5) },
        default_kv_heads: false,
        window_by_default: true,
        qkv_bias: object.flag_or("attention_bias", false)?,
        output_bias: false,
        qk_norm: if object.flag_or("use_qk_norm", false)? { QkNorm::PerHead } else { QkNorm::None },
        clip_qkv: None,
    };
    let attention::Read { attention, rope, softmax_scale } = attention::grouped(object, base, &rules)?;
    let width = object.size("moe_intermediate_size", 1..=MAX_WIDTH)?;
    let router = RouterRules {
        score: Score::Sigmoid,
        renormalize: object.flag("norm_topk_prob")?,
        scale: object.positive("routed_scaling_factor")?,
        groups: moe::groups(object, GroupScore::Top2Sum, Some(1))?,
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
            selection_bias: true,
            intermediate_size: width,
            shared: moe::shared(object, width)?,
            names: MoeNames::STANDARD,
        }),
        ffn_multiple: None,
    })
}
