//! The two kinds of attention, as families describe them.

use anabranch::{Rope, RopeLayout};
use serde_json::Value;

use super::{Base, MAX_HEAD_DIM, MAX_HEADS, MAX_PROJECTION, MAX_WIDTH, rope};
use crate::{
    Result,
    config::{Attention, QkNorm, json::Object},
};

/// Epsilon of the two norms inside latent attention: Transformers and the original code give it no setting.
const INNER_NORM_EPS: f32 = 1e-6;

/// An attention with its rotary embedding and softmax scale.
pub(super) struct Read {
    pub(super) attention: Attention,
    pub(super) rope: Rope,
    pub(super) softmax_scale: f32,
}

/// What a family fixes about grouped attention.
pub(super) struct GroupedRules {
    pub(super) rope: rope::Rules,
    /// Whether an absent `num_key_value_heads` means one for each query head.
    pub(super) default_kv_heads: bool,
    /// Whether `sliding_window` counts where `use_sliding_window` is absent.
    pub(super) window_by_default: bool,
    pub(super) qkv_bias: bool,
    pub(super) output_bias: bool,
    pub(super) qk_norm: QkNorm,
    pub(super) clip_qkv: Option<f32>,
}

/// Multi-head and grouped-query attention.
pub(super) fn grouped(object: &Object<'_>, base: &Base, rules: &GroupedRules) -> Result<Read> {
    check_window(object, base, rules.window_by_default)?;
    let num_heads = object.size("num_attention_heads", 1..=MAX_HEADS)?;
    let num_kv_heads = match object.optional_size("num_key_value_heads", &(1..=MAX_HEADS))? {
        None if rules.default_kv_heads => num_heads,
        None => return Err(object.missing("num_key_value_heads", "the number of key and value heads")),
        Some(heads) => heads,
    };
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(object
            .error(format!("num_key_value_heads must divide num_attention_heads ({num_heads}), got {num_kv_heads}")));
    }
    let head_dim = match object.optional_size("head_dim", &(1..=MAX_HEAD_DIM))? {
        Some(head_dim) => head_dim,
        None if base.hidden_size.is_multiple_of(num_heads) => base.hidden_size / num_heads,
        None => {
            return Err(object.error(format!(
                "num_attention_heads must divide hidden_size ({}) where head_dim is not given, got {num_heads}",
                base.hidden_size
            )));
        }
    };
    check_projection(object, "num_attention_heads * head_dim", num_heads * head_dim)?;
    let rotary = rope::read(object, base, head_dim, &rules.rope)?;
    let &GroupedRules { qkv_bias, output_bias, qk_norm, clip_qkv, .. } = rules;
    Ok(Read {
        attention: Attention::Grouped { num_heads, num_kv_heads, head_dim, qkv_bias, output_bias, qk_norm, clip_qkv },
        rope: rotary.rope,
        softmax_scale: (head_dim as f64).sqrt().recip() as f32,
    })
}

/// Multi-head latent attention of DeepSeek-V2 and V3.
pub(super) fn latent(object: &Object<'_>, base: &Base, layout: RopeLayout) -> Result<Read> {
    check_window(object, base, true)?;
    if object.optional_flag("use_mla")? == Some(false) {
        return Err(
            object.error("use_mla must be true, because this family is read as latent attention only, got false")
        );
    }
    let num_heads = object.size("num_attention_heads", 1..=MAX_HEADS)?;
    if let Some(kv_heads) = object.optional_size("num_key_value_heads", &(1..=MAX_HEADS))?
        && kv_heads != num_heads
    {
        return Err(object.error(format!(
            "num_key_value_heads must equal num_attention_heads ({num_heads}) in latent attention, got {kv_heads}"
        )));
    }
    let qk_nope_head_dim = object.size("qk_nope_head_dim", 1..=MAX_HEAD_DIM)?;
    let qk_rope_head_dim = object.size("qk_rope_head_dim", 1..=MAX_HEAD_DIM)?;
    let v_head_dim = object.size("v_head_dim", 1..=MAX_HEAD_DIM)?;
    let qk_head_dim = qk_nope_head_dim + qk_rope_head_dim;
    check_projection(
        object,
        "num_attention_heads * (qk_nope_head_dim + the larger of qk_rope_head_dim and v_head_dim)",
        num_heads * (qk_nope_head_dim + qk_rope_head_dim.max(v_head_dim)),
    )?;
    let rules = rope::Rules { layout, default_theta: Some(1e4), default_partial: None };
    let rotary = rope::read(object, base, qk_rope_head_dim, &rules)?;
    let scale = (qk_head_dim as f64).sqrt().recip() * rotary.latent_softmax_factor;
    Ok(Read {
        attention: Attention::Latent {
            num_heads,
            q_lora_rank: object.optional_size("q_lora_rank", &(1..=MAX_WIDTH))?,
            kv_lora_rank: object.size("kv_lora_rank", 1..=MAX_WIDTH)?,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
            bias: object.flag_or("attention_bias", false)?,
            inner_norm_eps: INNER_NORM_EPS,
        },
        rope: rotary.rope,
        softmax_scale: finite_scale(object, scale)?,
    })
}

fn check_projection(object: &Object<'_>, what: &str, width: usize) -> Result<()> {
    if width <= MAX_PROJECTION {
        return Ok(());
    }
    Err(object.error(format!("{what} must be at most {MAX_PROJECTION}, got {width}")))
}

fn finite_scale(object: &Object<'_>, scale: f64) -> Result<f32> {
    let scale = scale as f32;
    if scale.is_finite() && scale > 0.0 {
        return Ok(scale);
    }
    Err(object.error(format!("mscale_all_dim and factor must give a finite and positive softmax scale, got {scale}")))
}

/// Attention here sees the whole context, which a window at least as long as the context does not change.
fn check_window(object: &Object<'_>, base: &Base, window_by_default: bool) -> Result<()> {
    let longest = base.max_position_embeddings;
    let window = object.optional_size("sliding_window", &(0..=usize::MAX))?;
    let harmless = window.is_none_or(|window| window >= longest);
    // Qwen's files carry a window that this flag switches off.
    if !harmless && object.flag_or("use_sliding_window", window_by_default)? {
        let window = window.unwrap_or_default();
        return Err(object.error(format!(
            "sliding_window must be absent or at least max_position_embeddings ({longest}), because attention is \
             computed over the whole context, got {window}"
        )));
    }
    let Some(value) = object.get("layer_types") else { return Ok(()) };
    let Value::Array(kinds) = value else { return Err(object.wrong("layer_types", "a list of strings", value)) };
    match kinds.iter().find(|kind| kind.as_str() != Some("full_attention")) {
        Some(kind) if !(harmless && kind.as_str() == Some("sliding_attention")) => {
            Err(object.wrong("layer_types", r#""full_attention" in every layer"#, kind))
        }
        _ => Ok(()),
    }
}
