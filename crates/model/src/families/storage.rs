//! How weights are stored.

use anabranch::Dtype;
use serde_json::Value;

use super::MAX_WIDTH;
use crate::{Result, config::json::Object};

/// What the quantisation may leave unquantised: exactly what block-scaled checkpoints never quantise.
const NEVER_QUANTIZED: [&str; 7] =
    ["lm_head", "embed_tokens", "norm", "mlp.gate", "shared_expert_gate", "e_score_correction_bias", "eh_proj"];

/// The stored form of the weights.
pub(crate) struct Storage {
    /// Of everything that is not quantised.
    pub(crate) dtype: Dtype,
    /// Rows and columns that share a scale, in block-scaled FP8.
    pub(crate) fp8_block: Option<[usize; 2]>,
}

/// Reads the stored form, and refuses an activation that would be computed wrongly.
pub(crate) fn storage(object: &Object<'_>) -> Result<Storage> {
    object.expect_text("hidden_act", &["silu", "swish"])?;
    Ok(Storage { dtype: dtype(object)?, fp8_block: fp8_block(object)? })
}

/// `dtype` or `torch_dtype`; bf16, in which every supported family is published, if neither is there.
fn dtype(object: &Object<'_>) -> Result<Dtype> {
    for key in ["dtype", "torch_dtype"] {
        let Some(name) = object.optional_text(key)? else { continue };
        return match name.strip_prefix("torch.").unwrap_or(name) {
            "bfloat16" => Ok(Dtype::Bf16),
            "float16" => Ok(Dtype::F16),
            "float32" => Ok(Dtype::F32),
            _ => Err(object.error(format!(r#"{key} must be "bfloat16", "float16" or "float32", got {name:?}"#))),
        };
    }
    Ok(Dtype::Bf16)
}

fn fp8_block(object: &Object<'_>) -> Result<Option<[usize; 2]>> {
    let Some(quantization) = object.object("quantization_config", "quantization_config.")? else { return Ok(None) };
    if quantization.get("quant_method").is_none() {
        return Err(quantization.missing("quant_method", r#""fp8""#));
    }
    quantization.expect_text("quant_method", &["fp8"])?;
    quantization.expect_text("fmt", &["e4m3"])?;
    let block = quantization.sizes("weight_block_size", &(1..=MAX_WIDTH))?;
    let &[rows, columns] = block.as_slice() else {
        return Err(quantization.error(format!(
            "quantization_config.weight_block_size must be two sizes, such as [128, 128], got {}",
            if block.is_empty() { "none".to_owned() } else { format!("{} of them", block.len()) }
        )));
    };
    for key in ["modules_to_not_convert", "ignored_layers"] {
        let Some(value) = quantization.get(key) else { continue };
        let Value::Array(modules) = value else { return Err(quantization.wrong(key, "a list of modules", value)) };
        for module in modules {
            let known = |name: &str| NEVER_QUANTIZED.iter().any(|suffix| name.ends_with(suffix));
            if !module.as_str().is_some_and(known) {
                return Err(quantization.wrong(
                    key,
                    "a list of norms, routers and embeddings, since all other linear layers are read as FP8",
                    module,
                ));
            }
        }
    }
    Ok(Some([rows, columns]))
}
