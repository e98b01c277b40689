//! Random checkpoints in the Hugging Face layout, of any configuration: for trying sizes and speeds without a download.

mod tokenizer;
mod values;

pub(crate) use tokenizer::byte_level;
pub(crate) use values::Values;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anabranch::Dtype;
use serde_json::{Map, Value, json};

use crate::{
    Config, Error, Result,
    checkpoint::{INDEX_FILE, SINGLE_FILE, TensorLayout, write_tensor_file},
    tensors::TensorSpec,
};

/// How [`init`] makes a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitOptions {
    /// Seeds every tensor together with its name: the same seed gives the same values however they are sharded.
    pub seed: u64,
    /// Stores the weights in this type and drops the configuration's quantisation; `None` keeps what it says.
    pub dtype: Option<Dtype>,
    /// Most bytes of tensors in one file; a larger tensor has a file of its own.
    pub shard_bytes: u64,
}

impl Default for InitOptions {
    /// Seed 0, the configuration's own data type, shards of 5 GB as the Hugging Face libraries write them.
    fn default() -> Self {
        Self { seed: 0, dtype: None, shard_bytes: 5_000_000_000 }
    }
}

/// Writes a random checkpoint of the architecture in `config_json` to the folder `out`; `config_path` is what errors call
/// the configuration.
///
/// The folder gets `config.json` (as given, with `torch_dtype` set to what is written), safetensors files, with an index
/// if there are several, `generation_config.json`, and a byte-level `tokenizer.json` if the vocabulary has room for one.
/// It appears whole or not at all: files are written to a folder beside it, which is renamed at the end and removed on
/// an error. Memory use does not depend on the size.
///
/// After each piece `progress` is told the bytes of tensors written so far and in all; an error from it ends the work.
///
/// # Errors
/// [`Error::Config`] if the configuration is refused, [`Error::Input`] if `out` is there and not an empty folder or the
/// data type cannot be written, [`Error::Io`] if the disk refuses, and whatever `progress` returns.
pub fn init(
    config_path: &Path,
    config_json: &str,
    out: &Path,
    options: &InitOptions,
    progress: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let json = stored_config(config_path, config_json, options.dtype)?;
    let text = pretty(&json);
    let config = Config::from_json(config_path, &text)?;
    let tensors = config.tensors();
    let shards = split(&tensors, options.shard_bytes);

    let folder = NewFolder::create(out)?;
    write_json(&folder.path, "config.json", &json)?;
    write_json(&folder.path, "generation_config.json", &generation_config(&config))?;
    if let Some((tokenizer, settings)) = byte_level(&config) {
        write_json(&folder.path, "tokenizer.json", &tokenizer)?;
        write_json(&folder.path, "tokenizer_config.json", &settings)?;
    }

    let total: u64 = tensors.iter().map(byte_size).sum();
    let mut done = 0;
    let mut weight_map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => SINGLE_FILE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let layouts: Vec<_> = shard
            .iter()
            .map(|spec| TensorLayout {
                name: spec.name.as_str().into(),
                dtype: stored(spec.dtype),
                shape: spec.shape.as_slice().into(),
            })
            .collect();
        write_tensor_file(&folder.path.join(&name), &layouts, &[("format", "pt")], |index, file| {
            values::fill(&shard[index], options.seed, |bytes| {
                file.write(bytes)?;
                done += bytes.len() as u64;
                progress(done, total)
            })
        })?;
        weight_map.extend(shard.iter().map(|spec| (spec.name.clone(), Value::from(name.as_str()))));
    }
    if shards.len() > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        write_json(&folder.path, INDEX_FILE, &index)?;
    }
    folder.persist()
}

/// The configuration with the data type that is going to be written.
fn stored_config(path: &Path, text: &str, dtype: Option<Dtype>) -> Result<Value> {
    let refuse = |problem: String| Error::Config { path: path.to_path_buf(), problem };
    let mut json: Value = serde_json::from_str(text).map_err(|error| refuse(format!("not valid JSON: {error}")))?;
    let object = json.as_object_mut().ok_or_else(|| refuse("expected a JSON object".into()))?;
    let name = match dtype {
        Some(Dtype::F32) => "float32",
        Some(Dtype::F16) => "float16",
        Some(Dtype::Bf16) => "bfloat16",
        Some(other) => {
            let text = format!(
                "a checkpoint cannot be {other} throughout: choose f32, f16 or bf16, or none to follow quantization_config"
            );
            return Err(Error::Input(text));
        }
        None => {
            // Either key may hold it; bfloat16 is what a configuration without one gets.
            let said = ["torch_dtype", "dtype"].iter().find_map(|key| object.get(*key)).cloned();
            object.insert("torch_dtype".into(), said.unwrap_or_else(|| "bfloat16".into()));
            return Ok(json);
        }
    };
    object.remove("quantization_config");
    if object.contains_key("dtype") {
        object.insert("dtype".into(), name.into());
    }
    object.insert("torch_dtype".into(), name.into());
    Ok(json)
}

fn generation_config(config: &Config) -> Value {
    let mut object = Map::new();
    if let Some(id) = config.bos_token_id {
        object.insert("bos_token_id".into(), id.into());
    }
    match config.eos_token_ids[..] {
        [] => {}
        [id] => _ = object.insert("eos_token_id".into(), id.into()),
        ref ids => _ = object.insert("eos_token_id".into(), ids.into()),
    }
    object.insert("do_sample".into(), false.into());
    object.into()
}

/// Cuts the list where a shard would grow beyond the limit; at least one shard, each of at least one tensor.
fn split(tensors: &[TensorSpec], shard_bytes: u64) -> Vec<&[TensorSpec]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0u64);
    for (index, spec) in tensors.iter().enumerate() {
        let size = byte_size(spec);
        if index > start && bytes.saturating_add(size) > shard_bytes {
            shards.push(&tensors[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += size;
    }
    shards.push(&tensors[start..]);
    shards
}

fn byte_size(spec: &TensorSpec) -> u64 {
    spec.shape.iter().product::<usize>() as u64 * spec.dtype.size() as u64
}

fn stored(dtype: Dtype) -> safetensors::Dtype {
    match dtype {
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::Bf16 => safetensors::Dtype::BF16,
        Dtype::F8E4m3 => safetensors::Dtype::F8_E4M3,
        _ => safetensors::Dtype::F32,
    }
}

fn pretty(json: &Value) -> String {
    format!("{json:#}\n")
}

fn write_json(folder: &Path, name: &str, json: &Value) -> Result<()> {
    let path = folder.join(name);
    fs::write(&path, pretty(json)).map_err(Error::io("write", path))
}

/// A folder under a temporary name; removed with all that is in it unless it was persisted.
struct NewFolder {
    path: PathBuf,
    target: PathBuf,
    persisted: bool,
}

impl NewFolder {
    fn create(target: &Path) -> Result<Self> {
        let refuse = |text| Error::Input(format!("{} {text}; give the name of a new folder", target.display()));
        match fs::read_dir(target).map(Iterator::count) {
            Ok(1..) => return Err(refuse("is not empty")),
            Err(_) if target.exists() => return Err(refuse("is not a folder")),
            _ => {}
        }
        // An empty folder is there under its own name, whatever it was called ("." or "x/..").
        let target = fs::canonicalize(target).unwrap_or_else(|_| target.to_path_buf());
        let name = target.file_name().ok_or_else(|| refuse("has no name"))?;
        let parent = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.tmp", std::process::id()));
        let path = parent.join(hidden);
        fs::create_dir(&path).map_err(Error::io("create", &path))?;
        Ok(Self { path, target, persisted: false })
    }

    fn persist(mut self) -> Result<()> {
        // Not every system renames onto an empty folder. One that has been filled meanwhile stays as it is.
        if self.target.exists() {
            fs::remove_dir(&self.target).map_err(Error::io("replace", &self.target))?;
        }
        fs::rename(&self.path, &self.target).map_err(Error::io("create", &self.target))?;
        self.persisted = true;
        Ok(())
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !self.persisted {
            // Nothing more can be done about a folder that cannot be removed; the error that led here is the one to show.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
