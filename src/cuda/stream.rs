//! Streams, and the memory that is made on them.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use cudarc::driver::{CudaSlice, CudaStream, DriverError};

use super::{
    Device, Element, Shape, Tensor, View, ViewMut,
    cublaslt::CublasLt,
    launch::{driver, is_from_a_kernel, out_of_memory, reason},
};
use crate::{Error, Result, error::check_len};

/// A queue of work on one GPU, done in order. Cheap to clone; clones are the same queue.
#[derive(Debug, Clone)]
pub struct Stream {
    device: Device,
    queue: Arc<CudaStream>,
    /// Operations launched since the stream was last waited for, newest last. An error that a kernel meets while it runs
    /// comes up in whatever call asks the driver next, so these are the ones that may have met it.
    recent: Arc<Mutex<VecDeque<&'static str>>>,
    /// Where it was asked for and is there.
    cublaslt: Arc<OnceLock<CublasLt>>,
    /// Of this clone alone: [`Stream::with_settled_weights`].
    settled_weights: bool,
}

/// Launches that are remembered: those of a few layers.
const REMEMBERED: usize = 64;

impl Stream {
    pub(super) fn on(device: Device, stream: Arc<CudaStream>) -> Self {
        Self { device, queue: stream, recent: Arc::default(), cublaslt: Arc::default(), settled_weights: false }
    }

    /// Takes a stream that the caller made. Operations on it can be captured if cudarc's event tracking is off in its
    /// context, or if it is the context's only stream.
    ///
    /// # Errors
    /// [`Error::NoGpu`](crate::Error::NoGpu) if its GPU is too old.
    pub fn from_cudarc(stream: Arc<CudaStream>) -> Result<Self> {
        Ok(Self::on(Device::from_cudarc(Arc::clone(stream.context()))?, stream))
    }

    /// The GPU that it belongs to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The stream, for cudarc.
    pub fn cudarc(&self) -> &Arc<CudaStream> {
        &self.queue
    }

    /// Waits until everything on the stream is done. Reports what went wrong on the way.
    ///
    /// # Errors
    /// [`Error::Earlier`](crate::Error::Earlier) if a launch failed while it ran, [`Error::Driver`](crate::Error::Driver)
    /// for anything else; the context is then mostly unusable.
    pub fn synchronize(&self) -> Result<()> {
        self.queue.synchronize().map_err(|error| self.driver("synchronize", error))?;
        self.recent().clear();
        Ok(())
    }

    /// The same queue, for a caller who says that no launch on it that may still run writes the weights of the products that are
    /// launched by way of this handle: a model's, once the stream was waited for after they were loaded. [`linear_into`](super::linear_into)
    /// and [`norm_linear_into`](super::norm_linear_into) of a few tokens then begin to read them before the launches before have ended.
    #[must_use]
    pub fn with_settled_weights(self) -> Self {
        Self { settled_weights: true, ..self }
    }

    pub(super) fn settled_weights(&self) -> bool {
        self.settled_weights
    }

    /// Lets cuBLASLt compute dense products of this stream and its clones from so many tokens on (a good number:
    /// [`CUBLASLT_FROM_TOKENS`](super::CUBLASLT_FROM_TOKENS)); [`linear_into`](super::linear_into) says which. The library is looked
    /// for when this is called, as the system looks for any library; the environment variable `ANABRANCH_CUBLASLT` is read here and only
    /// here: `off`, `auto`, or the path of the library. It costs tens of milliseconds, and 32 MiB of the GPU's memory
    /// ([`Stream::cublaslt_workspace`]) for as long as the stream is there: a graph that was captured on it must not outlive it, nor
    /// run beside other work of it. A product's kernels are loaded when one of its sizes is first launched, which should not be in a
    /// capture. Once enabled it stays as it is.
    ///
    /// # Errors
    /// [`Error::NoCublasLt`](crate::Error::NoCublasLt) if it is not installed, switched off, or refuses this GPU or its driver: the stream
    /// works without. [`Error::Setting`](crate::Error::Setting) if the variable names a library that cannot be loaded,
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn enable_cublaslt(&self, from_tokens: usize) -> Result<()> {
        if self.cublaslt.get().is_none() {
            // Another thread may have been faster; then its is kept.
            let _ = self.cublaslt.set(CublasLt::new(self, from_tokens)?);
        }
        Ok(())
    }

    /// Bytes of the GPU's memory that cuBLASLt works in on this stream; 0 where it is not enabled.
    pub fn cublaslt_workspace(&self) -> usize {
        self.cublaslt.get().map_or(0, CublasLt::workspace_bytes)
    }

    pub(super) fn cublaslt(&self) -> Option<&CublasLt> {
        self.cublaslt.get()
    }

    /// Remembers that an operation was launched.
    pub(super) fn note(&self, operation: &'static str) {
        let mut recent = self.recent();
        if recent.len() == REMEMBERED {
            recent.pop_front();
        }
        recent.push_back(operation);
    }

    /// An error of the driver that came up in `operation`: its own, or an earlier launch's.
    pub(super) fn driver(&self, operation: &'static str, error: DriverError) -> Error {
        if is_from_a_kernel(error.0 as u32) { self.earlier(operation, reason(error)) } else { driver(operation, error) }
    }

    /// The error of a kernel that ran before `operation`.
    pub(super) fn earlier(&self, operation: &'static str, reason: String) -> Error {
        let mut launched: Vec<&'static str> = Vec::new();
        // The newest first, each once: a model's layers launch the same ones over and over.
        for name in self.recent().iter().rev() {
            if !launched.contains(name) {
                launched.push(name);
            }
        }
        Error::Earlier { operation, launched, reason }
    }

    fn recent(&self) -> MutexGuard<'_, VecDeque<&'static str>> {
        // A list of names is whole whatever happened to the thread that held it.
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// New memory full of zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory), or [`Error::Driver`](crate::Error::Driver) for anything else.
    pub fn zeros<T: Element>(&self, shape: impl Into<Shape>) -> Result<Tensor<T>> {
        let shape = shape.into();
        let mut slice = self.alloc(shape.len())?;
        self.queue.memset_zeros(&mut slice).map_err(|error| self.driver("zeros", error))?;
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
            self.queue.memcpy_htod(host, &mut slice).map_err(|error| self.driver("upload", error))?;
        }
        Ok(Tensor::from_parts(slice, shape))
    }

    /// Copies `host` to memory that is there. The copy takes its turn on the stream; `host` may be reused at once.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the lengths differ, [`Error::Driver`](crate::Error::Driver) if the copy
    /// cannot be made, [`Error::Earlier`](crate::Error::Earlier) if something before it failed.
    pub fn upload_into<T: Element>(&self, host: &[T], out: &mut ViewMut<'_, T>) -> Result<()> {
        check_len("upload", "host", host.len(), out.shape().len())?;
        if host.is_empty() {
            return Ok(());
        }
        self.queue.memcpy_htod(host, out.cudarc()).map_err(|error| self.driver("upload", error))
    }

    /// Copies to the host, and waits for it.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the copy or anything before it on the stream failed.
    pub fn download<T: Element>(&self, tensor: &View<'_, T>) -> Result<Vec<T>> {
        let mut host = vec![T::default(); tensor.shape().len()];
        if !host.is_empty() {
            let copied = self.queue.memcpy_dtoh(tensor.cudarc(), &mut host);
            copied.map_err(|error| self.driver("download", error))?;
        }
        self.synchronize()?;
        Ok(host)
    }

    /// Unset memory: who calls this writes all of it before it is read. At least one element, because CUDA has no
    /// allocations of nothing.
    pub(super) fn alloc<T: Element>(&self, len: usize) -> Result<CudaSlice<T>> {
        let len = len.max(1);
        // SAFETY: elements are plain numbers, for which any bits are a value; no host code reads them before a copy.
        let slice = unsafe { self.queue.alloc(len) };
        slice.map_err(|error| out_of_memory(self, len.saturating_mul(size_of::<T>()), error))
    }
}
