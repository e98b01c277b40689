//! One safetensors file: `u64` header length (little endian), JSON header, then every tensor's bytes without gaps.
//!
//! Format: <https://github.com/huggingface/safetensors#format>. A header maps each name to `dtype`, `shape` and
//! `data_offsets`, counted from the end of the header; `__metadata__` maps strings to strings.

use std::{
    collections::HashMap,
    fmt,
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;
use safetensors::Dtype;
use serde::{
    Deserialize, Deserializer,
    de::{IntoDeserializer, MapAccess, Visitor, value},
};

use super::Tensor;
use crate::{Error, Result};

/// Longest header that is read: DeepSeek-V3 in one file would need about 15 MB. The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;
const LENGTH_BYTES: usize = 8;

/// One safetensors file, mapped into memory, its header checked.
///
/// Opening reads the header only; a tensor's pages are read from disk when its bytes are first touched. The file must
/// not be shortened while it is open: the operating system ends the process that touches a page which is gone.
#[derive(Debug, Clone)]
pub struct TensorFile {
    contents: Arc<Contents>,
}

/// What a file's tensors share.
pub(super) struct Contents {
    pub(super) path: PathBuf,
    storage: Storage,
    pub(super) entries: Vec<Entry>,
    by_name: HashMap<String, usize>,
}

/// Where one tensor lies.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Place in the file's bytes; checked against their length when the file was opened.
    range: Range<usize>,
}

enum Storage {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Storage {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

impl Contents {
    pub(super) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.storage.bytes()[entry.range.clone()]
    }
}

impl fmt::Debug for Contents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TensorFile")
            .field("path", &self.path)
            .field("tensors", &self.entries.len())
            .finish_non_exhaustive()
    }
}

impl TensorFile {
    /// Maps the file at `path` and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, [`Error::Checkpoint`] if it is not a whole, well-formed safetensors
    /// file; the message says which rule is broken, and how many bytes are missing if it was cut short.
    pub fn open(path: &Path) -> Result<Self> {
        // Asked before opening, because opening a named pipe waits for its other end.
        let kind = fs::metadata(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => problem(path, "no such file"),
            _ => Error::io("open", path)(source),
        })?;
        if !kind.is_file() {
            return Err(problem(path, "not a regular file; a safetensors file was expected"));
        }
        if kind.len() == 0 {
            return Err(problem(path, EMPTY));
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        // SAFETY: the map is read-only and private to this process, and every access goes through a slice of the length
        // that it has now. What the language cannot promise is that no other process changes the file meanwhile; the
        // documentation of this type leaves that to the caller, as every program that maps its weights does.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Self::new(path, Storage::Mapped(map))
    }

    /// Reads a file that is in memory already; `path` is what errors and [`Tensor::path`] call it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the bytes are not a whole, well-formed safetensors file.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::new(path, Storage::Owned(bytes))
    }

    fn new(path: &Path, storage: Storage) -> Result<Self> {
        let entries = parse_header(storage.bytes()).map_err(|text| problem(path, text))?;
        let by_name = entries.iter().enumerate().map(|(index, entry)| (entry.name.clone(), index)).collect();
        Ok(Self { contents: Arc::new(Contents { path: path.to_path_buf(), storage, entries, by_name }) })
    }

    /// The path that the file was opened by.
    pub fn path(&self) -> &Path {
        &self.contents.path
    }

    /// Names of the tensors, in the order of their bytes in the file.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.contents.entries.iter().map(|entry| entry.name.as_str())
    }

    /// The tensor called `name`; costs no copy.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if there is none of that name.
    pub fn get(&self, name: &str) -> Result<Tensor> {
        let index = self.index(name).ok_or_else(|| {
            let some: Vec<_> = self.names().take(4).collect();
            let more = if self.contents.entries.len() > some.len() { ", ..." } else { "" };
            problem(self.path(), format!("holds no tensor \"{name}\"; it holds {}{more}", quoted(&some)))
        })?;
        Ok(self.at(index))
    }

    pub(super) fn index(&self, name: &str) -> Option<usize> {
        self.contents.by_name.get(name).copied()
    }

    /// The tensor at a place that `index` gave.
    pub(super) fn at(&self, index: usize) -> Tensor {
        Tensor { contents: Arc::clone(&self.contents), index }
    }

    /// Bytes of the tensor at a place that `index` gave.
    pub(super) fn len_at(&self, index: usize) -> usize {
        self.contents.entries[index].range.len()
    }
}

const EMPTY: &str = "empty file; download it again";

pub(super) fn problem(path: &Path, problem: impl Into<String>) -> Error {
    Error::Checkpoint { path: path.to_path_buf(), problem: problem.into() }
}

fn quoted(names: &[&str]) -> String {
    if names.is_empty() { "none".into() } else { format!("\"{}\"", names.join("\", \"")) }
}

/// Checks a whole file's bytes and returns its tensors in the order of their offsets, or what is wrong in words.
///
/// Guarantees: names are distinct, tensors follow one another without gap or overlap from the end of the header to the
/// end of the file, and each has as many bytes as its shape and data type ask for.
fn parse_header(bytes: &[u8]) -> Result<Vec<Entry>, String> {
    if bytes.is_empty() {
        return Err(EMPTY.into());
    }
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!("only {} bytes, too short for a safetensors file; download it again", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    // Little-endian text where the length should be, such as that of a Git LFS pointer, reads as a huge number.
    if length > MAX_HEADER_BYTES {
        return Err(format!(
            "not a safetensors file: its first 8 bytes give a header of {length} bytes, more than the format's {MAX_HEADER_BYTES}"
        ));
    }
    let length = length as usize;
    let Some(header) = rest.get(..length) else {
        return Err(format!(
            "cut short: its header should have {length} bytes, but only {} follow; download it again",
            rest.len()
        ));
    };
    let header = str::from_utf8(header).map_err(|error| format!("its header is not UTF-8: {error}"))?;
    let Header(mut infos) =
        serde_json::from_str(header).map_err(|error| format!("its header is not valid safetensors JSON: {error}"))?;
    infos.sort_by_key(|(_, info)| info.data_offsets);

    let start = LENGTH_BYTES + length;
    let data_bytes = rest.len() - length;
    let mut end = 0;
    let mut entries: Vec<Entry> = Vec::with_capacity(infos.len());
    for (name, info) in infos {
        let (from, to) = info.data_offsets;
        let size = byte_size(info.dtype, &info.shape).ok_or_else(|| {
            format!("tensor \"{name}\" of shape {:?} and type {} has no whole number of bytes", info.shape, info.dtype)
        })?;
        if from < end {
            let other = entries.last().map_or("", |entry| entry.name.as_str());
            return Err(format!("tensor \"{name}\" at {from}..{to} overlaps tensor \"{other}\", which ends at {end}"));
        }
        if from > end {
            return Err(format!("{} unused bytes lie before tensor \"{name}\" at {from}..{to}", from - end));
        }
        if to.checked_sub(from) != Some(size) {
            return Err(format!(
                "tensor \"{name}\" lies at {from}..{to}, but its shape {:?} and type {} need {size} bytes",
                info.shape, info.dtype
            ));
        }
        end = to;
        // Sums cannot overflow where the file is long enough; where it is not, the error follows the loop.
        let range = start.saturating_add(from)..start.saturating_add(to);
        entries.push(Entry { name, dtype: info.dtype, shape: info.shape, range });
    }
    match end.cmp(&data_bytes) {
        std::cmp::Ordering::Equal => Ok(entries),
        std::cmp::Ordering::Greater => Err(format!(
            "cut short: {} bytes of {} are missing; download it again",
            end - data_bytes,
            end.saturating_add(start)
        )),
        std::cmp::Ordering::Less => {
            Err(format!("{} bytes follow the last tensor; the file is not what its header says", data_bytes - end))
        }
    }
}

/// Bytes of a tensor; `None` if they overflow or, for types narrower than a byte, do not come out whole.
pub(super) fn byte_size(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let bits = shape.iter().try_fold(dtype.bitsize(), |bits, &size| bits.checked_mul(size))?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// A header's tensors as listed. Unlike a map, it refuses a name that is listed twice.
struct Header(Vec<(String, Info)>);

#[derive(Deserialize)]
struct Info {
    #[serde(deserialize_with = "dtype")]
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// Reads a data type; the derived error would list every type there is.
fn dtype<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Dtype, D::Error> {
    let name = String::deserialize(deserializer)?;
    let read: Result<Dtype, value::Error> = Dtype::deserialize(name.as_str().into_deserializer());
    read.map_err(|_| serde::de::Error::custom(format!("unknown data type \"{name}\"")))
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut seen = std::collections::HashSet::new();
                let mut infos = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!("tensor \"{name}\" is listed twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<Option<HashMap<String, String>>>()?;
                    } else {
                        infos.push((name, map.next_value()?));
                    }
                }
                Ok(Header(infos))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
