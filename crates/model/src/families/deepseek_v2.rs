//! `deepseek_v2`: DeepSeek-V2 and V2-Lite (arXiv 2405.04434). Latent attention; softmax, then top-k over all experts or
//! over the groups with the best expert; scaled and, as in Transformers, never renormalised.

use anabranch::{GroupScore, RopeLayout, Score};

use super::{Architecture, Base, MAX_WIDTH, attention, moe, moe::RouterRules};
use crate::{
    Result,
    config::{Moe, MoeNames, json::Object},
};

pub(super) fn read(object: &Object<'_>, base: &Base) -> Result<Architecture> {
    object.expect_text("scoring_func", &["softmax"])?;
    if object.flag_or("mlp_bias", false)? {
        return Err(object.error("mlp_bias must be false, because experts here have no biases, got true"));
    }
    let attention::Read { attention, rope, softmax_scale } = attention::latent(object, base, RopeLayout::Interleaved)?;
    // Early remote code spelled it "gready".
    let methods = ["greedy", "group_limited_greedy", "gready"];
    object.expect_text("topk_method", &methods)?;
    let groups = match object.optional_text("topk_method")? {
        Some("group_limited_greedy") => moe::groups(object, GroupScore::Max, None)?,
        Some(_) => None,
        None => return Err(object.missing("topk_method", r#""greedy" or "group_limited_greedy""#)),
    };
    let width = object.size("moe_intermediate_size", 1..=MAX_WIDTH)?;
    let router = RouterRules {
        score: Score::Softmax,
        renormalize: false,
        scale: object.positive("routed_scaling_factor")?,
        groups,
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
        ffn_multiple: None,
    })
}
