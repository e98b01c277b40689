//! One stored tensor.

use std::{fmt, path::Path, sync::Arc};

use half::{bf16, f16};
use safetensors::Dtype;

use super::shard::{Contents, Entry, problem};
use crate::{Error, Result};

/// One tensor of a checkpoint: a name, a shape, and bytes that stay in the mapped file until they are touched.
///
/// Keeps its file open; a clone costs one reference count.
#[derive(Clone)]
pub struct Tensor {
    pub(super) contents: Arc<Contents>,
    pub(super) index: usize,
}

impl Tensor {
    fn entry(&self) -> &Entry {
        &self.contents.entries[self.index]
    }

    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.entry().name
    }

    /// The file that holds it.
    pub fn path(&self) -> &Path {
        &self.contents.path
    }

    /// How its elements are stored.
    pub fn dtype(&self) -> Dtype {
        self.entry().dtype
    }

    /// Its sizes, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.entry().shape
    }

    /// Its elements, row-major and little-endian, at whatever alignment the file gives them.
    pub fn bytes(&self) -> &[u8] {
        self.contents.bytes(self.entry())
    }

    /// Checks the shape.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] that names tensor, actual and expected shape.
    pub fn expect_shape(&self, shape: &[usize]) -> Result<()> {
        if self.shape() == shape {
            return Ok(());
        }
        Err(self.problem(&format!("has shape {:?}, expected {shape:?}", self.shape())))
    }

    /// The data type as an operation's.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is none that weights are stored in.
    pub fn weight_dtype(&self) -> Result<anabranch::Dtype> {
        match self.dtype() {
            Dtype::F32 => Ok(anabranch::Dtype::F32),
            Dtype::F16 => Ok(anabranch::Dtype::F16),
            Dtype::BF16 => Ok(anabranch::Dtype::Bf16),
            Dtype::F8_E4M3 => Ok(anabranch::Dtype::F8E4m3),
            other => Err(self.problem(&format!("has data type {other}, expected F32, F16, BF16 or F8_E4M3"))),
        }
    }

    /// Every element as float32. FP8 codes give their own value: a block scale is a tensor of its own.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if [`Tensor::weight_dtype`] has one.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        Ok(match self.weight_dtype()? {
            anabranch::Dtype::F32 => self.elements(f32::from_le_bytes),
            anabranch::Dtype::F16 => self.elements(|bytes| f16::from_le_bytes(bytes).to_f32()),
            anabranch::Dtype::Bf16 => self.elements(|bytes| bf16::from_le_bytes(bytes).to_f32()),
            anabranch::Dtype::F8E4m3 => self.elements(|[code]| anabranch::f8e4m3_to_f32(code)),
            other => return Err(self.problem(&format!("has data type {other}, which cannot be read as float32"))),
        })
    }

    /// Every element as a 64-bit integer.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it is stored as neither I64 nor I32.
    pub fn to_i64(&self) -> Result<Vec<i64>> {
        match self.dtype() {
            Dtype::I64 => Ok(self.elements(i64::from_le_bytes)),
            Dtype::I32 => Ok(self.elements(|bytes| i64::from(i32::from_le_bytes(bytes)))),
            other => Err(self.problem(&format!("has data type {other}, expected I64 or I32"))),
        }
    }

    fn elements<const N: usize, T>(&self, read: impl Fn([u8; N]) -> T) -> Vec<T> {
        self.bytes().as_chunks::<N>().0.iter().map(|&bytes| read(bytes)).collect()
    }

    fn problem(&self, text: &str) -> Error {
        problem(self.path(), format!("tensor {} {text}", self.name()))
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tensor")
            .field("name", &self.name())
            .field("dtype", &self.dtype())
            .field("shape", &self.shape())
            .finish()
    }
}
