//! Checkpoints in the Hugging Face layout: safetensors files, one or several, read through a memory map.

mod index;
mod shard;
mod tensor;
mod write;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

pub use index::Index;
pub use shard::TensorFile;
pub use tensor::Tensor;
pub use write::{TensorLayout, TensorWriter, write_tensor_file, write_tensors, write_tensors_to};

use crate::{Error, Result};
use shard::problem;

/// File of a checkpoint that has one.
pub const SINGLE_FILE: &str = "model.safetensors";
/// File that names the shards of a checkpoint that has several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Longest index that is read; DeepSeek-V3's, of 91,991 tensors, has 9 MB.
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// All weights of a model: every shard mapped, every header checked, nothing read yet.
///
/// Tensors that a shard holds but the index does not name are no part of it.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The index, or the only file: what an absent tensor is absent from.
    source: PathBuf,
    shards: Vec<TensorFile>,
    /// Shard and place in it, by name.
    tensors: BTreeMap<String, (usize, usize)>,
}

impl Checkpoint {
    /// Opens the checkpoint in a folder: the shards that `model.safetensors.index.json` names, else `model.safetensors`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is neither, if the index is malformed or leaves the folder, if a shard is missing,
    /// cut short or malformed, or if a shard lacks a tensor that the index says it has; [`Error::Io`] if a file cannot
    /// be read.
    pub fn open(dir: &Path) -> Result<Self> {
        match fs::metadata(dir) {
            Ok(kind) if kind.is_dir() => {}
            Ok(_) => return Err(problem(dir, "a file; give the folder that holds it")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(problem(dir, "no such folder")),
            Err(error) => return Err(Error::io("open", dir)(error)),
        }
        match File::open(dir.join(INDEX_FILE)) {
            Ok(file) => Self::open_sharded(dir, file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::open_single(dir),
            Err(error) => Err(Error::io("open", dir.join(INDEX_FILE))(error)),
        }
    }

    fn open_single(dir: &Path) -> Result<Self> {
        let source = dir.join(SINGLE_FILE);
        if is_absent(&source) {
            let text = format!("holds neither {SINGLE_FILE} nor {INDEX_FILE}; weights of other formats are not read");
            return Err(problem(dir, text));
        }
        let shard = TensorFile::open(&source)?;
        let tensors = shard.names().enumerate().map(|(place, name)| (name.to_owned(), (0, place))).collect();
        Ok(Self { source, shards: vec![shard], tensors })
    }

    fn open_sharded(dir: &Path, file: File) -> Result<Self> {
        let source = dir.join(INDEX_FILE);
        let mut text = Vec::new();
        file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut text).map_err(Error::io("read", &source))?;
        if text.len() as u64 > MAX_INDEX_BYTES {
            return Err(problem(&source, format!("longer than {MAX_INDEX_BYTES} bytes, more than any index needs")));
        }
        let Index { weight_map } = Index::from_json(&source, &text)?;

        let mut shards = Vec::new();
        let mut opened = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (tensor, name) in weight_map {
            let shard = if let Some(&shard) = opened.get(&name) {
                shard
            } else {
                let path = dir.join(&name);
                if is_absent(&path) {
                    return Err(problem(&path, format!("missing shard, named by {INDEX_FILE}; download it again")));
                }
                shards.push(TensorFile::open(&path)?);
                opened.insert(name, shards.len() - 1);
                shards.len() - 1
            };
            let file = &shards[shard];
            let place = file.index(&tensor).ok_or_else(|| {
                problem(file.path(), format!("lacks tensor \"{tensor}\", which {INDEX_FILE} says it holds"))
            })?;
            tensors.insert(tensor, (shard, place));
        }
        Ok(Self { source, shards, tensors })
    }

    /// Names of all tensors, in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor called `name`, from whichever shard holds it; costs no copy.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is none of that name.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        match self.tensors.get(name) {
            Some(&(shard, place)) => Ok(self.shards[shard].at(place)),
            None => Err(problem(
                &self.source,
                format!("holds no tensor \"{name}\"; config.json asks for it, so one of the two is of another model"),
            )),
        }
    }

    /// Bytes of all tensors together, as stored.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|&(shard, place)| self.shards[shard].len_at(place) as u64).sum()
    }
}

/// Whether there is nothing of that name, or a link to nothing, rather than something that may not be looked at.
fn is_absent(path: &Path) -> bool {
    path.try_exists().is_ok_and(|exists| !exists)
}
