//! Rotary embedding in both styles: `rope_theta` with `rope_scaling`, and the newer `rope_parameters`.

use anabranch::{Rope, RopeLayout, RopeScaling, yarn_mscale};

use super::Base;
use crate::{Result, config::json::Object};

/// Longest context that pretraining is believed to have had.
const MAX_CONTEXT: usize = 1 << 30;

/// What a family fixes about its rotary embedding.
pub(super) struct Rules {
    /// Which elements form pairs.
    pub(super) layout: RopeLayout,
    /// The base where the file has none; `None` if it must be there.
    pub(super) default_theta: Option<f64>,
    /// The rotated fraction of a head where the file says nothing; `None` if the family always rotates whole heads.
    pub(super) default_partial: Option<f64>,
}

/// LLaMA's: halves, whole heads.
pub(super) const fn half(default_theta: Option<f64>) -> Rules {
    Rules { layout: RopeLayout::Half, default_theta, default_partial: None }
}

/// A rotary embedding, and what it does to the softmax scale of latent attention.
pub(super) struct Rotary {
    pub(super) rope: Rope,
    /// The square of `YaRN`'s temperature with `mscale_all_dim` (DeepSeek-V2 and V3); 1 without one.
    pub(super) latent_softmax_factor: f64,
}

/// Reads the rotary embedding of heads of `head_dim` elements (of the rotary part, in latent attention).
pub(super) fn read(object: &Object<'_>, base: &Base, head_dim: usize, rules: &Rules) -> Result<Rotary> {
    // Transformers gives `rope_scaling` precedence where both are there.
    let nested = match object.object("rope_scaling", "rope_scaling.")? {
        Some(scaling) => Some(scaling),
        None => object.object("rope_parameters", "rope_parameters.")?,
    };
    let number = |key: &str| match nested.map(|nested| nested.optional_number(key)).transpose()?.flatten() {
        Some(number) => Ok(Some(number)),
        None => object.optional_number(key),
    };
    let theta = number("rope_theta")?
        .or(rules.default_theta)
        .ok_or_else(|| object.missing("rope_theta", "the base of the rotary frequencies"))?;

    let partial = number("partial_rotary_factor")?;
    let rotary_dim = match (partial.or(rules.default_partial), rules.default_partial) {
        (None, _) | (Some(1.0), None) => head_dim,
        (Some(factor), None) => {
            return Err(object.error(format!(
                "partial_rotary_factor must be 1, because this family rotates whole heads, got {factor}"
            )));
        }
        (Some(factor), Some(_)) if factor > 0.0 && factor <= 1.0 => (head_dim as f64 * factor) as usize,
        (Some(factor), Some(_)) => {
            return Err(object.error(format!("partial_rotary_factor must be above 0 and at most 1, got {factor}")));
        }
    };
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        return Err(object.error(format!(
            "the rotary part of a head must have an even number of elements, got {rotary_dim} \
             (see head_dim, qk_rope_head_dim and partial_rotary_factor)"
        )));
    }

    let (scaling, latent_softmax_factor) = match nested {
        Some(nested) => read_scaling(object, &nested, base)?,
        None => (RopeScaling::None, 1.0),
    };
    let rope = Rope::new(rotary_dim, theta, rules.layout, scaling).map_err(|error| object.error(error))?;
    Ok(Rotary { rope, latent_softmax_factor })
}

fn read_scaling(object: &Object<'_>, nested: &Object<'_>, base: &Base) -> Result<(RopeScaling, f64)> {
    let kind = match nested.optional_text("rope_type")? {
        Some(kind) => Some(kind),
        None => nested.optional_text("type")?,
    };
    // Some models keep the pretraining context outside; that one wins in Transformers.
    let original_context = match object.optional_size("original_max_position_embeddings", &(1..=MAX_CONTEXT))? {
        Some(context) => context,
        None => nested
            .optional_size("original_max_position_embeddings", &(1..=MAX_CONTEXT))?
            .unwrap_or(base.max_position_embeddings),
    };
    let scaling = match kind {
        None | Some("default") => return Ok((RopeScaling::None, 1.0)),
        Some("linear") => RopeScaling::Linear { factor: nested.number("factor")? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: nested.number("factor")?,
            low_freq_factor: nested.number("low_freq_factor")?,
            high_freq_factor: nested.number("high_freq_factor")?,
            original_context,
        },
        Some("yarn") => {
            let factor = match nested.optional_number("factor")? {
                Some(factor) => factor,
                None => base.max_position_embeddings as f64 / original_context as f64,
            };
            // Zero counts as absent, as in Python.
            let nonzero = |key: &str| Ok::<_, crate::Error>(nested.optional_number(key)?.filter(|n| *n != 0.0));
            let attention_factor = match (nested.optional_number("attention_factor")?, nonzero("mscale")?) {
                (Some(given), _) => given,
                (None, Some(mscale)) => match nonzero("mscale_all_dim")? {
                    Some(all_dim) => yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim),
                    None => yarn_mscale(factor, 1.0),
                },
                (None, None) => yarn_mscale(factor, 1.0),
            };
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
                beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
                truncate: nested.flag_or("truncate", true)?,
                attention_factor,
            }
        }
        Some(other) => {
            return Err(
                object.error(format!(r#"rope type must be "default", "linear", "llama3" or "yarn", got {other:?}"#))
            );
        }
    };
    let factor = match scaling {
        RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. } | RopeScaling::Yarn { factor, .. } => {
            factor
        }
        _ => 1.0,
    };
    let all_dim = nested.optional_number("mscale_all_dim")?.unwrap_or(0.0);
    let temperature = if all_dim == 0.0 { 1.0 } else { yarn_mscale(factor, all_dim) };
    Ok((scaling, temperature * temperature))
}
