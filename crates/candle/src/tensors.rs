//! candle's tensors as the library's views: checked, borrowed, never copied.

use std::ops::Deref;

use anabranch::cuda::{Element, Shape, View};
use candle_core::{DType, Device, Error, Layout, Result, Storage, Tensor, cuda_backend::CudaDType};

/// An error of the library as candle's.
pub(crate) fn wrapped(error: anabranch::Error) -> Error {
    Error::wrap(error).bt()
}

/// A tensor's memory, held for reading while views of it are in use.
pub(crate) struct Held<'a, G> {
    name: &'static str,
    /// candle's guard of its lock.
    storage: G,
    layout: &'a Layout,
}

/// Checks a tensor's data type, place and order, and holds it.
pub(crate) fn hold<'a>(
    name: &'static str,
    tensor: &'a Tensor,
    dtype: DType,
    device: &Device,
) -> Result<Held<'a, impl Deref<Target = Storage> + use<'a>>> {
    if tensor.dtype() != dtype {
        let got = tensor.dtype();
        candle_core::bail!("{name} must be {dtype:?}, got {got:?}: convert it with to_dtype(DType::{dtype:?})");
    }
    if !tensor.device().same_device(device) {
        candle_core::bail!("{name} must be on {:?} as x is, got {:?}", device.location(), tensor.device().location());
    }
    if !tensor.is_contiguous() {
        candle_core::bail!("{name} must be contiguous, got strides {:?}: pass contiguous()?", tensor.stride());
    }
    let (storage, layout) = tensor.storage_and_layout();
    Ok(Held { name, storage, layout })
}

impl<G: Deref<Target = Storage>> Held<'_, G> {
    /// The tensor as the library sees it.
    pub(crate) fn view<T: CudaDType + Element>(&self) -> Result<View<'_, T>> {
        let Storage::Cuda(storage) = &*self.storage else {
            candle_core::bail!("{} must be on a CUDA device", self.name);
        };
        let Some((start, end)) = self.layout.contiguous_offsets() else {
            candle_core::bail!("{} must be contiguous", self.name);
        };
        let shape = match *self.layout.dims() {
            [a] => Shape::from([a]),
            [a, b] => Shape::from([a, b]),
            [a, b, c] => Shape::from([a, b, c]),
            _ => candle_core::bail!("{} must have one to three dimensions, got {:?}", self.name, self.layout.dims()),
        };
        View::new(storage.as_cuda_slice::<T>()?.slice(start..end), shape).map_err(wrapped)
    }
}
