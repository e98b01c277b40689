//! Streams, and the memory that is made on them.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream};

use super::{
    Device, Element, Shape, Tensor, View,
    launch::{driver, out_of_memory},
};
use crate::{Result, error::check_len};

/// A queue of work on one GPU, done in order. Cheap to clone; clones are the same queue.
#[derive(Debug, Clone)]
pub struct Stream {
    device: Device,
    stream: Arc<CudaStream>,
}

impl Stream {
    pub(super) fn on(device: Device, stream: Arc<CudaStream>) -> Self {
        Self { device, stream }
    }

    /// Takes a stream that the caller made. Operations on it can be captured if cudarc's event tracking is off in its
    /// context, or if it is the context's only stream.
    ///
    /// # Errors
    /// [`Error::NoGpu`](crate::Error::NoGpu) if its GPU is too old.
    pub fn from_cudarc(stream: Arc<CudaStream>) -> Result<Self> {
        Ok(Self { device: Device::from_cudarc(Arc::clone(stream.context()))?, stream })
    }

    /// The GPU that it belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The stream, for cudarc.
    pub fn cudarc(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Waits until everything on the stream is done. Reports what went wrong on the way.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if something did; the context is then mostly unusable.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|error| driver("synchronize", error))
    }

    /// New memory full of zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), or [`Error::Driver`](crate::Error::Driver) for anything else.
    pub fn zeros<T: Element>(&self, shape: impl Into<Shape>) -> Result<Tensor<T>> {
        let shape = shape.into();
        let mut slice = self.alloc(shape.len())?;
        self.stream.memset_zeros(&mut slice).map_err(|error| driver("zeros", error))?;
        Ok(Tensor::from_parts(slice, shape))
    }

    /// New memory with the values of `host`, row-major.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the length does not fit the shape, and those of [`Stream::zeros`].
    pub fn upload<T: Element>(&self, shape: impl Into<Shape>, host: &[T]) -> Result<Tensor<T>> {
        let shape = shape.into();
        check_len("upload", "host", host.len(), shape.len())?;
        let mut slice = self.alloc(shape.len())?;
        if !host.is_empty() {
            self.stream.memcpy_htod(host, &mut slice).map_err(|error| driver("upload", error))?;
        }
        Ok(Tensor::from_parts(slice, shape))
    }

    /// Copies to the host, and waits for it.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the copy or anything before it on the stream failed.
    pub fn download<T: Element>(&self, tensor: &View<'_, T>) -> Result<Vec<T>> {
        let mut host = vec![T::default(); tensor.shape().len()];
        if !host.is_empty() {
            let copied = self.stream.memcpy_dtoh(tensor.cudarc(), &mut host);
            copied.map_err(|error| driver("download", error))?;
        }
        self.synchronize()?;
        Ok(host)
    }

    /// Unset memory: who calls this writes all of it before it is read. At least one element, because CUDA has no
    /// allocations of nothing.
    pub(super) fn alloc<T: Element>(&self, len: usize) -> Result<CudaSlice<T>> {
        let len = len.max(1);
        // SAFETY: elements are plain numbers, for which any bits are a value; no host code reads them before a copy.
        let slice = unsafe { self.stream.alloc(len) };
        slice.map_err(|error| out_of_memory(&self.device, len * size_of::<T>(), error))
    }
}
