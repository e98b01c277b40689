//! Where a model comes from: a checkpoint, or nothing but a configuration.

use crate::{failure::Failure, progress};
use anabranch_model::{Backend, Config, Error, Model, Tokenizer, presets};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// What to run, as every command that runs a model asks.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Source {
    /// Folder with config.json, safetensors files and tokenizer.json
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Run a config.json, or a published configuration by its name, with random weights that are made on the GPU
    #[arg(long, value_name = "FILE|PRESET")]
    random_weights: Option<String>,
}

impl Source {
    /// The checkpoint's folder.
    pub(crate) fn folder(&self) -> Option<&Path> {
        self.model.as_deref()
    }

    /// What errors call it.
    pub(crate) fn name(&self) -> String {
        let folder = self.folder().map(|folder| folder.display().to_string());
        folder.or_else(|| self.random_weights.clone()).unwrap_or_default()
    }

    pub(crate) fn config(&self) -> Result<Config, Failure> {
        if let Some(folder) = self.folder() {
            return Ok(Config::from_dir(folder)?);
        }
        let (path, text) = configuration(&self.name())?;
        Ok(Config::from_json(&path, &text)?)
    }

    /// The checkpoint's tokenizer, or one of bytes.
    pub(crate) fn tokenizer(&self, config: &Config) -> Result<Tokenizer, Failure> {
        match self.folder() {
            Some(folder) => Ok(Tokenizer::from_dir(folder)?),
            None => Ok(Tokenizer::byte_level(config)?),
        }
    }

    /// The model, with a bar while it is loaded.
    pub(crate) fn load<B: Backend>(&self, config: &Config, backend: B) -> Result<Model<B>, Failure> {
        Ok(progress::loading(|report| match self.folder() {
            Some(folder) => Model::load(folder, backend, report),
            None => Model::random(config.clone(), 0, backend, report),
        })?)
    }
}

/// A `config.json`, the folder that holds it, or a preset: the path that errors name, and the JSON text.
pub(crate) fn configuration(named: &str) -> Result<(PathBuf, String), Failure> {
    let mut path = PathBuf::from(named);
    if path.is_dir() {
        path.push("config.json");
    }
    if !path.exists() {
        if let Some(text) = presets::json(named) {
            return Ok((path, text.to_owned()));
        }
        let names: Vec<_> = presets::names().collect();
        return Err(Failure::Failed(format!(
            "{named}: no such file, and no preset: the presets are {}",
            names.join(", ")
        )));
    }
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    Ok((path, text))
}
