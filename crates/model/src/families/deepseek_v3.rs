//! `deepseek_v3` and `kimi_k2`: DeepSeek-V3 and R1 (arXiv 2412.19437), Kimi K2, Moonlight. Latent attention; sigmoid,
//! selection bias, groups by the sum of their two best, renormalised, then scaled. Multi-token-prediction layers are
//! not part of the main model.

use anabranch::{GroupScore, RopeLayout, Score};

use super::{Architecture, Base, MAX_WIDTH, attention, moe, moe::RouterRules};
use crate::{
    Result,
    config::{Moe, MoeNames, json::Object},
};

pub(super) fn read(object: &Object<'_>, base: &Base) -> Result<Architecture> {
    object.expect_text("scoring_func", &["sigmoid"])?;
    object.expect_text("topk_method", &["noaux_tc"])?;
    let interleaved = object.flag_or("rope_interleave", true)?;
    let layout = if interleaved { RopeLayout::Interleaved } else { RopeLayout::Half };
    let attention::Read { attention, rope, softmax_scale } = attention::latent(object, base, layout)?;
    let width = object.size("moe_intermediate_size", 1..=MAX_WIDTH)?;
    let router = RouterRules {
        score: Score::Sigmoid,
        renormalize: object.flag("norm_topk_prob")?,
        scale: object.positive("routed_scaling_factor")?,
        groups: moe::groups(object, GroupScore::Top2Sum, None)?,
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
