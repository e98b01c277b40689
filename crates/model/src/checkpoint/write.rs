//! Writing safetensors files: atomically, and one tensor at a time, so that a file may be larger than memory.

use std::{
    borrow::Cow,
    io::{BufWriter, Write},
    path::Path,
};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::shard::{byte_size, problem};
use crate::{Error, Result, write_whole};

/// What a header says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorLayout<'a> {
    /// Its name, distinct within the file.
    pub name: Cow<'a, str>,
    /// How its elements are stored.
    pub dtype: Dtype,
    /// Its sizes, outermost first.
    pub shape: Cow<'a, [usize]>,
}

/// Takes the bytes of one tensor, in as many pieces as the caller likes.
pub struct TensorWriter<'a> {
    out: &'a mut dyn Write,
    path: &'a Path,
    name: &'a str,
    remaining: usize,
}

impl TensorWriter<'_> {
    /// Appends elements, row-major and little-endian.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be written (a full disk, a closed pipe), [`Error::Checkpoint`] if they are more than
    /// the tensor's shape holds.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(remaining) = self.remaining.checked_sub(bytes.len()) else {
            let extra = bytes.len() - self.remaining;
            return Err(problem(self.path, format!("tensor {} was given {extra} bytes too many", self.name)));
        };
        self.out.write_all(bytes).map_err(Error::io("write", self.path))?;
        self.remaining = remaining;
        Ok(())
    }
}

/// Writes a safetensors file of tensors that are in memory: [`write_tensor_file`] for the usual case.
///
/// # Errors
/// Those of [`write_tensor_file`]; also [`Error::Checkpoint`] if the bytes are not as many as the shape asks for.
pub fn write_tensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize], &'a [u8])>,
    metadata: &[(&str, &str)],
) -> Result<()> {
    let (layouts, data): (Vec<_>, Vec<_>) = tensors
        .into_iter()
        .map(|(name, dtype, shape, bytes)| (TensorLayout { name: name.into(), dtype, shape: shape.into() }, bytes))
        .unzip();
    write_tensor_file(path, &layouts, metadata, |index, out| out.write(data[index]))
}

/// Writes a safetensors file whose tensors `fill` produces one by one, in the order of `layouts`.
///
/// The file appears whole or not at all, as [`write_whole`] has it; a device or a pipe is written as it stands.
///
/// # Errors
/// [`Error::Io`] if the folder, the disk or the pipe refuses; [`Error::Checkpoint`] if two names are equal or `fill` gives
/// a tensor too few or too many bytes; and whatever `fill` returns. The temporary file is gone in each case.
pub fn write_tensor_file(
    path: &Path,
    layouts: &[TensorLayout<'_>],
    metadata: &[(&str, &str)],
    fill: impl FnMut(usize, &mut TensorWriter<'_>) -> Result<()>,
) -> Result<()> {
    write_whole(path, |out| write_tensors_to(out, path, layouts, metadata, fill))
}

/// Writes the same bytes as [`write_tensor_file`] to any writer; `path` is what errors call it.
///
/// # Errors
/// Those of [`write_tensor_file`].
pub fn write_tensors_to(
    out: impl Write,
    path: &Path,
    layouts: &[TensorLayout<'_>],
    metadata: &[(&str, &str)],
    mut fill: impl FnMut(usize, &mut TensorWriter<'_>) -> Result<()>,
) -> Result<()> {
    let (header, sizes) = header(path, layouts, metadata)?;
    let mut out = BufWriter::with_capacity(1 << 20, out);
    out.write_all(&header).map_err(Error::io("write", path))?;
    for (index, (layout, size)) in layouts.iter().zip(sizes).enumerate() {
        let mut writer = TensorWriter { out: &mut out, path, name: &layout.name, remaining: size };
        fill(index, &mut writer)?;
        if writer.remaining > 0 {
            let text = format!("tensor {} was given {} of its {size} bytes", layout.name, size - writer.remaining);
            return Err(problem(path, text));
        }
    }
    out.flush().map_err(Error::io("write", path))
}

/// Length and JSON header, padded with spaces so that the data begins at a multiple of 8; and each tensor's bytes.
fn header(path: &Path, layouts: &[TensorLayout<'_>], metadata: &[(&str, &str)]) -> Result<(Vec<u8>, Vec<usize>)> {
    let mut json = Map::new();
    if !metadata.is_empty() {
        let entries: Map<_, _> = metadata.iter().map(|&(key, value)| (key.to_owned(), Value::from(value))).collect();
        json.insert("__metadata__".into(), entries.into());
    }
    let mut sizes = Vec::with_capacity(layouts.len());
    let mut offset = 0usize;
    for layout in layouts {
        let overflow = || problem(path, format!("tensor {} of shape {:?} is too large", layout.name, layout.shape));
        let size = byte_size(layout.dtype, &layout.shape).ok_or_else(overflow)?;
        let end = offset.checked_add(size).ok_or_else(overflow)?;
        let entry = json!({ "dtype": layout.dtype, "shape": layout.shape, "data_offsets": [offset, end] });
        if json.insert(layout.name.to_string(), entry).is_some() {
            return Err(problem(path, format!("two tensors are to be called \"{}\"", layout.name)));
        }
        sizes.push(size);
        offset = end;
    }
    let mut text = Value::Object(json).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok((bytes, sizes))
}
