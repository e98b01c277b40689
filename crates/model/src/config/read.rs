//! From a folder, a file, a preset's name or JSON text to a [`Config`].

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    Config, FeedForward,
    json::{self, Object, quoted},
};
use crate::{
    Error, Result,
    families::{Base, FAMILIES, MAX_WIDTH, Storage, storage},
    presets,
};

const MAX_LAYERS: usize = 1000;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 30;
/// Most parameters in all: sizes in bytes and FLOPs of whole sequences stay far inside 64 bits.
const MAX_PARAMETERS: u128 = 1 << 50;

impl Config {
    /// Reads `config.json` of a checkpoint folder, and the begin and end tokens of `generation_config.json`, which
    /// take precedence, if it is there.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read; [`Error::Config`] if one is malformed, contradicts itself, or asks for
    /// something that is not supported.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let mut config = Self::from_json(&path, &json::read_text(&path)?)?;
        let path = dir.join("generation_config.json");
        if path.try_exists().map_err(Error::io("read", &path))? {
            let fields = json::parse(&path, &json::read_text(&path)?)?;
            config.read_tokens(&Object::new(&path, &fields))?;
        }
        Ok(config)
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// As [`Config::from_dir`]; `path_for_errors` is what they name.
    pub fn from_json(path_for_errors: &Path, text: &str) -> Result<Self> {
        let fields: Map<String, Value> = json::parse(path_for_errors, text)?;
        let object = Object::new(path_for_errors, &fields);
        let supported: Vec<_> = FAMILIES.iter().map(|&(name, _)| name).collect();
        object.expect_text("model_type", &supported)?;
        let model_type = object.optional_text("model_type")?;
        let Some(&(model_type, read)) = FAMILIES.iter().find(|&&(name, _)| Some(name) == model_type) else {
            return Err(object.missing("model_type", quoted(&supported)));
        };
        let base = Base {
            hidden_size: object.size("hidden_size", 1..=MAX_WIDTH)?,
            num_layers: object.size("num_hidden_layers", 1..=MAX_LAYERS)?,
            max_position_embeddings: object.size("max_position_embeddings", 1..=MAX_POSITIONS)?,
        };
        let Storage { dtype, fp8_block } = storage(&object)?;
        let family = read(&object, &base)?;
        let moe = family.moe.filter(|_| family.layers.contains(&FeedForward::Moe));
        let mut config = Self {
            model_type: model_type.to_owned(),
            vocab_size: object.size("vocab_size", 1..=MAX_VOCAB)?,
            hidden_size: base.hidden_size,
            max_position_embeddings: base.max_position_embeddings,
            rms_norm_eps: object.positive("rms_norm_eps")?,
            tie_word_embeddings: object.flag_or("tie_word_embeddings", false)?,
            dtype,
            fp8_block,
            attention: family.attention,
            softmax_scale: family.softmax_scale,
            rope: family.rope,
            layers: family.layers,
            intermediate_size: family.intermediate_size,
            mlp_bias: family.mlp_bias,
            ffn_multiple: family.ffn_multiple,
            moe,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        };
        config.read_tokens(&object)?;
        let parameters = config.parameters_unbounded();
        if parameters > MAX_PARAMETERS {
            return Err(object
                .error(format!("the sizes together must give at most {MAX_PARAMETERS} parameters, got {parameters}")));
        }
        Ok(config)
    }

    /// Reads a checkpoint folder, a configuration file, or a preset by its name.
    ///
    /// # Errors
    /// As [`Config::from_dir`]; if the argument is none of the three, the error lists the presets.
    pub fn load(dir_or_preset: &str) -> Result<Self> {
        let path = Path::new(dir_or_preset);
        if path.is_dir() {
            return Self::from_dir(path);
        }
        if path.is_file() {
            return Self::from_json(path, &json::read_text(path)?);
        }
        Self::preset(dir_or_preset).unwrap_or_else(|| {
            let names: Vec<_> = presets::names().collect();
            Err(Error::Config {
                path: path.to_owned(),
                problem: format!("no such folder or file, and no preset: the presets are {}", names.join(", ")),
            })
        })
    }

    /// The published configuration of that name (see [`presets::names`]); `None` if there is none.
    pub fn preset(name: &str) -> Option<Result<Self>> {
        let text = presets::json(name)?;
        Some(Self::from_json(Path::new(name), text))
    }

    /// Takes over `bos_token_id` and `eos_token_id`, which may be a list, where they are given.
    fn read_tokens(&mut self, object: &Object<'_>) -> Result<()> {
        let range = 0..=u32::MAX as usize;
        // A list of begin tokens occurs in saved files; the first is the one that is prepended.
        let read = |key: &str| match object.get(key) {
            None => Ok(None),
            Some(Value::Array(_)) => object.sizes(key, &range).map(Some),
            Some(_) => Ok(object.optional_size(key, &range)?.map(|id| vec![id])),
        };
        if let Some(ids) = read("bos_token_id")? {
            self.bos_token_id = ids.first().map(|&id| id as u32);
        }
        if let Some(ids) = read("eos_token_id")? {
            self.eos_token_ids = ids.iter().map(|&id| id as u32).collect();
        }
        Ok(())
    }
}
