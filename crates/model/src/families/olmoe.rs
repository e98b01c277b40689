//! `olmoe`: OLMoE-1B-7B (arXiv 2409.02060). Norms over the whole query and key projections; softmax, then top-k.

use anabranch::Score;

use super::{Architecture, Base, MAX_WIDTH, attention, attention::GroupedRules, moe, moe::RouterRules, rope};
use crate::{
    Result,
    config::{Attention, FeedForward, Moe, MoeNames, QkNorm, json::Object},
};

pub(super) fn read(object: &Object<'_>, base: &Base) -> Result<Architecture> {
    let bias = object.flag_or("attention_bias", false)?;
    let clip_qkv = object.get("clip_qkv").map(|_| object.positive("clip_qkv")).transpose()?;
    let rules = GroupedRules {
        rope: rope::half(Some(1e4)),
        default_kv_heads: true,
        window_by_default: true,
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::Whole,
        clip_qkv,
    };
    let attention::Read { attention, rope, softmax_scale } = attention::grouped(object, base, &rules)?;
    if let Attention::Grouped { num_heads, head_dim, .. } = attention
        && num_heads * head_dim != base.hidden_size
    {
        return Err(object.error(format!(
            "head_dim must be hidden_size / num_attention_heads ({} / {num_heads}), because the query norm is as wide \
             as the model, got {head_dim}",
            base.hidden_size
        )));
    }
    let width = object.size("intermediate_size", 1..=MAX_WIDTH)?;
    let router =
        RouterRules { score: Score::Softmax, renormalize: object.flag("norm_topk_prob")?, scale: 1.0, groups: None };
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
            names: MoeNames::STANDARD,
        }),
        ffn_multiple: None,
    })
}
