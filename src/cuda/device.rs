//! Opening a GPU.

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, DriverError,
    sys::{CUmemPool_attribute, cuDriverGetVersion},
};

use super::{Stream, launch::driver, sys::anabranch_runtime_version};
use crate::{Error, Result};

/// The oldest compute capability that the kernels run on.
const OLDEST: (i32, i32) = (8, 0);

/// An opened GPU. Cheap to clone.
///
/// It shares the process's primary context on that GPU with other libraries. cudarc's own tracking of which stream last
/// used which buffer is off for what is allocated through it, because the events that it records cannot be captured in a CUDA
/// graph. Instead an operation refuses tensors that were made on another stream.
#[derive(Debug, Clone)]
pub struct Device {
    context: Arc<CudaContext>,
    capability: (i32, i32),
}

impl Device {
    /// Number of GPUs that this process sees.
    ///
    /// # Errors
    /// [`Error::NoGpu`] if there is no driver, or one that does not work.
    pub fn count() -> Result<usize> {
        require_driver()?;
        CudaContext::device_count().map(|count| count.unsigned_abs() as usize).map_err(no_gpu)
    }

    /// Opens GPU number `ordinal`, counted from 0. Costs tens of milliseconds and some 500 MB of its memory the first time.
    ///
    /// # Errors
    /// [`Error::NoGpu`] if there is no such GPU, or its driver or architecture is too old.
    pub fn open(ordinal: usize) -> Result<Self> {
        let count = Self::count()?;
        if ordinal >= count {
            return Err(Error::NoGpu { reason: format!("GPU {ordinal} was asked for, and there are {count}, from 0") });
        }
        let context = CudaContext::new(ordinal).map_err(no_gpu)?;
        // SAFETY: cudarc asks that buffers made from here on are not used on two streams without order between them.
        // They are made through `Stream` only, and `launch::pointer` refuses them on any other stream.
        unsafe { context.disable_event_tracking() };
        Self::from_cudarc(context)
    }

    /// Takes a context that the caller opened, tracking and all.
    ///
    /// # Errors
    /// [`Error::NoGpu`] if the GPU or its driver is too old.
    pub fn from_cudarc(context: Arc<CudaContext>) -> Result<Self> {
        let capability = context.compute_capability().map_err(no_gpu)?;
        check_capability(context.ordinal(), capability)?;
        Ok(Self { context, capability })
    }

    /// A new stream on this GPU.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver cannot make one.
    pub fn new_stream(&self) -> Result<Stream> {
        let stream = self.context.new_stream().map_err(|error| driver("new_stream", error))?;
        Ok(Stream::on(self.clone(), stream))
    }

    /// Compute capability, such as (9, 0).
    pub fn capability(&self) -> (i32, i32) {
        self.capability
    }

    /// The product's name.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver cannot tell.
    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(|error| driver("device name", error))
    }

    /// Free and total memory, in bytes.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver cannot tell.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.context.mem_get_info().map_err(|error| driver("device memory", error))
    }

    /// The most memory that this process has taken from this GPU at a time, in bytes, where the driver keeps count; else
    /// `None`. Allocations of all streams count, what CUDA itself and the kernels' code take does not.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver cannot tell.
    pub fn peak_memory(&self) -> Result<Option<usize>> {
        if !self.context.has_async_alloc() {
            return Ok(None);
        }
        let mut peak = 0_u64;
        // SAFETY: the context's device is valid, its default pool is never destroyed, and this attribute is one 64-bit
        // number.
        let asked = unsafe {
            cudarc::driver::result::device::get_default_mem_pool(self.context.cu_device()).and_then(|pool| {
                let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH;
                cudarc::driver::result::mem_pool::get_attribute(pool, attribute, (&raw mut peak).cast())
            })
        };
        asked.map_err(|error| driver("device memory", error))?;
        Ok(Some(peak as usize))
    }

    /// The context, for cudarc.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }
}

/// Asks before cudarc is first used, which panics where the driver is missing or lacks a function.
fn require_driver() -> Result<()> {
    let names = if cfg!(windows) { &["nvcuda.dll"][..] } else { &["libcuda.so.1", "libcuda.so"] };
    // SAFETY: loading NVIDIA's driver runs its initialisers, as the first CUDA call of any program does.
    let present = names.iter().any(|name| unsafe { libloading::Library::new(*name) }.is_ok());
    if !present {
        return Err(Error::NoGpu { reason: format!("the NVIDIA driver ({}) is not installed", names[0]) });
    }
    let mut installed = 0;
    // SAFETY: the driver is there, and this function writes one int.
    unsafe { cuDriverGetVersion(&raw mut installed) }.result().map_err(no_gpu)?;
    // SAFETY: the function reads a constant.
    let runtime = unsafe { anabranch_runtime_version() };
    check_driver(installed, runtime)
}

/// Within a major release any driver runs any runtime. Versions are as CUDA writes them, 1000 major + 10 minor.
fn check_driver(installed: i32, runtime: i32) -> Result<()> {
    let major = |version: i32| version / 1000;
    if major(installed) < major(runtime) {
        let reason = format!(
            "the driver is for CUDA {}.{}, but {}.0 or newer is needed: update the driver",
            major(installed),
            installed % 1000 / 10,
            major(runtime),
        );
        return Err(Error::NoGpu { reason });
    }
    Ok(())
}

/// Refuses a GPU that is older than the kernels.
fn check_capability(ordinal: usize, capability: (i32, i32)) -> Result<()> {
    if capability >= OLDEST {
        return Ok(());
    }
    let ((major, minor), (oldest_major, oldest_minor)) = (capability, OLDEST);
    let reason =
        format!("GPU {ordinal} has compute capability {major}.{minor}, but {oldest_major}.{oldest_minor} is needed");
    Err(Error::NoGpu { reason })
}

fn no_gpu(error: DriverError) -> Error {
    let what = error.error_string().map_or_else(|_| format!("{error:?}"), |text| text.to_string_lossy().into_owned());
    Error::NoGpu { reason: format!("the driver says: {what}") }
}

#[cfg(test)]
mod tests {
    use super::{check_capability, check_driver};

    #[test]
    fn an_old_driver_is_refused_in_a_sentence() {
        assert!(check_driver(13_000, 13_000).is_ok() && check_driver(13_000, 13_010).is_ok());
        assert!(check_driver(14_000, 13_010).is_ok());
        let text = check_driver(12_080, 13_000).unwrap_err().to_string();
        let expected =
            "no usable CUDA GPU: the driver is for CUDA 12.8, but 13.0 or newer is needed: update the driver";
        assert_eq!(text, expected);
    }

    #[test]
    fn an_old_gpu_is_refused_in_a_sentence() {
        assert!(check_capability(0, (8, 0)).is_ok() && check_capability(0, (12, 0)).is_ok());
        let text = check_capability(1, (7, 5)).unwrap_err().to_string();
        assert_eq!(text, "no usable CUDA GPU: GPU 1 has compute capability 7.5, but 8.0 is needed");
    }
}
