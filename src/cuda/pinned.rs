//! Page-locked host memory: what the GPU fetches by itself while the host goes on.

use cudarc::driver::{CudaEvent, PinnedHostSlice, sys::CUresult};

use super::{
    Element, Stream, ViewMut,
    launch::{Launch, reason},
};
use crate::{Error, Result};

/// Host memory that the operating system keeps in place. A copy from it to the GPU runs at the bus's speed and beside whatever the host
/// does; the memory is lent to the copy until that is done.
#[derive(Debug)]
pub struct Pinned<T> {
    memory: PinnedHostSlice<T>,
    /// The end of the last copy. cudarc records one of its own, but only where it tracks buffers.
    copied: CudaEvent,
}

impl<T: Element> Pinned<T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.memory.len()
    }

    /// Whether there are none, which is never so.
    pub fn is_empty(&self) -> bool {
        self.memory.is_empty()
    }

    /// To read and fill. Waits until copies from it are done.
    ///
    /// # Errors
    /// [`Error::Driver`] if a copy, or what ran before it, failed.
    pub fn as_mut_slice(&mut self) -> Result<&mut [T]> {
        let done = self.copied.synchronize().and_then(|()| self.memory.as_mut_slice());
        done.map_err(|error| Error::Driver { operation: "pinned", reason: reason(error) })
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // If this fails the context is lost, and with it the copy.
        let _ = self.copied.synchronize();
    }
}

impl Stream {
    /// Page-locked memory of `len` elements, at least one, full of zeros, for copies by any stream of this GPU. It takes milliseconds and
    /// memory that nothing else can use: keep a few and reuse them.
    ///
    /// # Errors
    /// [`Error::OutOfHostMemory`] if the system refuses so much, [`Error::Driver`] for anything else.
    pub fn pinned<T: Element>(&self, len: usize) -> Result<Pinned<T>> {
        let operation = "pinned";
        let (context, len) = (self.device().context(), len.max(1));
        let refused = || Error::OutOfHostMemory { operation, asked: len.saturating_mul(size_of::<T>()) };
        if len > isize::MAX as usize / size_of::<T>() {
            return Err(refused());
        }
        let failed = |error| self.driver(operation, error);
        let copied = context.new_event(None).map_err(failed)?;
        // Not write-combined: weights are filled in by all cores in whatever order.
        // SAFETY: elements are plain numbers, for which any bits are a value, and they are set before anybody sees them.
        let memory = unsafe { context.alloc_pinned_with_flags(len, 0) };
        let mut memory = memory.map_err(|error| match error.0 {
            // Only the length can be a wrong value.
            CUresult::CUDA_ERROR_OUT_OF_MEMORY | CUresult::CUDA_ERROR_INVALID_VALUE => refused(),
            _ => failed(error),
        })?;
        memory.as_mut_slice().map_err(failed)?.fill(T::default());
        Ok(Pinned { memory, copied })
    }

    /// Copies from the beginning of `host` as many elements as `out` has. The copy takes its turn on the stream, and nobody waits for it but
    /// who wants `host` back.
    ///
    /// # Errors
    /// [`Error::Shape`] if `host` is too short, [`Error::Place`] if either belongs elsewhere, and those of [`Stream::upload_into`].
    pub fn upload_pinned_into<T: Element>(&self, host: &mut Pinned<T>, out: &mut ViewMut<'_, T>) -> Result<()> {
        let operation = "upload";
        let shape = out.shape();
        if host.len() < shape.len() {
            return Err(Error::Shape {
                operation,
                argument: "host",
                expected: format!("at least {} long", shape.len()),
                got: host.len().to_string(),
            });
        }
        if host.memory.context() != self.device().context() {
            return Err(Error::Place { operation, argument: "host", place: "GPU" });
        }
        Launch::begin(operation, self)?.check("out", out.cudarc(), shape, shape)?;
        if shape.is_empty() {
            return Ok(());
        }
        // After a copy by another stream, so that the one event stands for both.
        let queue = self.cudarc();
        let copied = queue.wait(&host.copied).and_then(|()| {
            queue.memcpy_htod(&host.memory.as_slice()?[..shape.len()], out.cudarc())?;
            host.copied.record(queue)
        });
        copied.map_err(|error| self.driver(operation, error))
    }
}
