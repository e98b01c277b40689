//! The GPU's memory: what is taken, and what for.

use std::{
    ops::{Deref, DerefMut},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use anabranch::cuda::{Element, Shape, Stream, Tensor};

use super::staging::Staging;
use crate::{Error, Result};

/// What memory is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    Weights,
    Cache,
    Workspace,
}

/// What was taken of the GPU's memory: bytes, each the most at a time, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GpuUsage {
    /// Weights, padded.
    pub weights: u64,
    /// Keys and values.
    pub cache: u64,
    /// Activations, and what operations and cuBLASLt asked for.
    pub workspace: u64,
    /// Allocations so far, given back or not. A pass over no more tokens and no longer contexts than passes before it makes none.
    pub allocations: u64,
}

/// A stream, the count of what is taken on it, and the way for weights to get there.
#[derive(Debug)]
pub(super) struct Gpu {
    pub(super) stream: Stream,
    meter: Arc<Meter>,
    staging: Mutex<Staging>,
}

#[derive(Debug, Default)]
struct Meter {
    purposes: [Count; 3],
    allocations: AtomicU64,
}

#[derive(Debug, Default)]
struct Count {
    now: AtomicU64,
    most: AtomicU64,
}

/// Counted memory. It gives itself back.
#[derive(Debug)]
pub(super) struct Buffer<T> {
    tensor: Tensor<T>,
    held: Held,
}

#[derive(Debug)]
struct Held {
    meter: Arc<Meter>,
    purpose: Purpose,
    bytes: u64,
}

impl Gpu {
    pub(super) fn new(stream: Stream) -> Self {
        // Loading ends with a wait for them (`Backend::loaded`).
        let stream = stream.with_settled_weights();
        let gpu = Self { stream, meter: Arc::default(), staging: Mutex::default() };
        // The stream holds what cuBLASLt works in for as long as the model is there.
        match gpu.stream.cublaslt_workspace() as u64 {
            0 => {}
            bytes => gpu.meter.take(Purpose::Workspace, bytes),
        }
        gpu
    }

    pub(super) fn usage(&self) -> GpuUsage {
        let most = |purpose| self.meter.purposes[purpose as usize].most.load(Ordering::Relaxed);
        GpuUsage {
            weights: most(Purpose::Weights),
            cache: most(Purpose::Cache),
            workspace: most(Purpose::Workspace),
            allocations: self.meter.allocations.load(Ordering::Relaxed),
        }
    }

    pub(super) fn staging(&self) -> MutexGuard<'_, Staging> {
        // Buffers are whole whatever happened to the thread that filled one.
        self.staging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes that are free now.
    pub(super) fn free(&self) -> Result<u64> {
        Ok(self.stream.device().memory()?.0 as u64)
    }

    /// New memory full of zeros.
    pub(super) fn zeros<T: Element>(&self, purpose: Purpose, shape: impl Into<Shape>) -> Result<Buffer<T>> {
        let tensor = self.stream.zeros(shape)?;
        Ok(self.counted(purpose, tensor))
    }

    /// New memory with these values.
    pub(super) fn upload<T: Element>(
        &self,
        purpose: Purpose,
        shape: impl Into<Shape>,
        host: &[T],
    ) -> Result<Buffer<T>> {
        let tensor = self.stream.upload(shape, host)?;
        Ok(self.counted(purpose, tensor))
    }

    /// Makes a buffer hold at least `len` elements. What it held is lost if it grows, and given back before more is taken.
    pub(super) fn reserve<T: Element>(&self, buffer: &mut Buffer<T>, len: usize) -> Result<()> {
        if buffer.shape().len() < len {
            let purpose = buffer.held.purpose;
            *buffer = self.zeros(purpose, [0])?;
            *buffer = self.zeros(purpose, [len])?;
        }
        Ok(())
    }

    fn counted<T: Element>(&self, purpose: Purpose, tensor: Tensor<T>) -> Buffer<T> {
        let bytes = (tensor.shape().len() * size_of::<T>()) as u64;
        self.meter.take(purpose, bytes);
        Buffer { tensor, held: Held { meter: Arc::clone(&self.meter), purpose, bytes } }
    }
}

impl Meter {
    fn take(&self, purpose: Purpose, bytes: u64) {
        let count = &self.purposes[purpose as usize];
        let now = count.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        count.most.fetch_max(now, Ordering::Relaxed);
        self.allocations.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.meter.purposes[self.purpose as usize].now.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl<T> Deref for Buffer<T> {
    type Target = Tensor<T>;

    fn deref(&self) -> &Tensor<T> {
        &self.tensor
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut Tensor<T> {
        &mut self.tensor
    }
}

/// The model's error for memory that the GPU does not have, with what would fit; other errors stay as they are.
pub(super) fn explain(error: Error, what: impl FnOnce() -> String, advice: impl FnOnce(u64) -> String) -> Error {
    match error {
        Error::Operation(anabranch::Error::OutOfMemory { asked, free, .. }) => {
            let (needed, free) = (asked as u64, free as u64);
            Error::GpuMemory { what: what(), needed, free, advice: advice(free) }
        }
        error => error,
    }
}
