//! `llama`: dense, the comparator. LLaMA 1 to 3.

use super::{Architecture, Base, MAX_WIDTH, attention, attention::GroupedRules, rope};
use crate::{
    Result,
    config::{FeedForward, QkNorm, json::Object},
};

pub(super) fn read(object: &Object<'_>, base: &Base) -> Result<Architecture> {
    let bias = object.flag_or("attention_bias", false)?;
    let rules = GroupedRules {
        // LLaMA 1 and 2 were published before the field existed.
        rope: rope::half(Some(1e4)),
        default_kv_heads: true,
        window_by_default: true,
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: QkNorm::None,
        clip_qkv: None,
    };
    let attention::Read { attention, rope, softmax_scale } = attention::grouped(object, base, &rules)?;
    Ok(Architecture {
        attention,
        rope,
        softmax_scale,
        layers: vec![FeedForward::Dense; base.num_layers],
        intermediate_size: object.size("intermediate_size", 1..=MAX_WIDTH)?,
        mlp_bias: object.flag_or("mlp_bias", false)?,
        moe: None,
        // `multiple_of` of the published LLaMA 1 and 2 training code.
        ffn_multiple: Some(256),
    })
}
