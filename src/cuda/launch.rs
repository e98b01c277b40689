//! What every launch does: place and shape checks, device pointers that stay valid past it, and its status.

use std::ffi::CStr;

use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, DriverError, SyncOnDrop, sys::CUresult};

use super::{Device, Element, Shape, Stream, View, ViewMut, sys};
use crate::{Error, Result};

/// A device pointer for the launcher. While the guard lives, cudarc knows the memory to be in use by this stream.
pub(super) struct Pointer<'a, T> {
    pub(super) pointer: *mut T,
    _guard: Option<SyncOnDrop<'a>>,
}

impl<T> Pointer<'_, T> {
    /// What an absent argument is passed as.
    pub(super) fn null() -> Self {
        Self { pointer: std::ptr::null_mut(), _guard: None }
    }
}

/// The arguments of one launch.
#[derive(Clone, Copy)]
pub(super) struct Launch<'a> {
    pub(super) operation: &'static str,
    pub(super) stream: &'a Stream,
}

impl<'a> Launch<'a> {
    /// Makes the stream's context current on this thread, as every launcher needs.
    pub(super) fn begin(operation: &'static str, stream: &'a Stream) -> Result<Self> {
        stream.device().context().bind_to_thread().map_err(|error| stream.driver(operation, error))?;
        Ok(Self { operation, stream })
    }

    /// Makes a GPU's context current on this thread, as a query that asks for the GPU's facts needs.
    pub(super) fn bind(operation: &'static str, device: &Device) -> Result<()> {
        device.context().bind_to_thread().map_err(|error| driver(operation, error))
    }

    /// A tensor to read, of this shape.
    pub(super) fn read<T: Element>(
        self,
        argument: &'static str,
        view: &'a View<'_, T>,
        shape: impl Into<Shape>,
    ) -> Result<Pointer<'a, T>> {
        self.check(argument, view.cudarc(), view.shape(), shape.into())?;
        let (pointer, guard) = view.cudarc().device_ptr(self.stream.cudarc());
        Ok(Pointer { pointer: pointer as *mut T, _guard: Some(guard) })
    }

    /// A tensor to write, of this shape.
    pub(super) fn write<T: Element>(
        self,
        argument: &'static str,
        view: &'a mut ViewMut<'_, T>,
        shape: impl Into<Shape>,
    ) -> Result<Pointer<'a, T>> {
        let got = view.shape();
        let view = view.cudarc();
        self.check(argument, view, got, shape.into())?;
        let (pointer, guard) = view.device_ptr_mut(self.stream.cudarc());
        Ok(Pointer { pointer: pointer as *mut T, _guard: Some(guard) })
    }

    /// Workspace of at least this many bytes.
    pub(super) fn workspace(self, view: &'a mut ViewMut<'_, u8>, bytes: usize) -> Result<Pointer<'a, u8>> {
        let got = view.shape();
        if got.len() < bytes {
            return Err(Error::Shape {
                operation: self.operation,
                argument: "workspace",
                expected: format!("at least {bytes} bytes"),
                got: got.len().to_string(),
            });
        }
        self.write("workspace", view, got)
    }

    /// Tells whether the launcher launched.
    pub(super) fn end(self, status: sys::AnabranchStatus) -> Result<()> {
        let cuda = sys::AnabranchStatus::ANABRANCH_STATUS_CUDA.0;
        if status.0 > cuda && is_from_a_kernel(status.0 - cuda) {
            return Err(self.stream.earlier(self.operation, status_text(status)));
        }
        launched(self.operation, status)?;
        self.stream.note(self.operation);
        Ok(())
    }

    pub(super) fn raw_stream(self) -> sys::AnabranchStream {
        self.stream.cudarc().cu_stream().cast()
    }

    /// Refuses a tensor of another shape, or of another place than the stream's.
    pub(super) fn check<T, S: DeviceSlice<T>>(
        self,
        argument: &'static str,
        slice: &S,
        got: Shape,
        expected: Shape,
    ) -> Result<()> {
        let operation = self.operation;
        if got != expected {
            let (expected, got) = (expected.to_string(), got.to_string());
            return Err(Error::Shape { operation, argument, expected, got });
        }
        let (home, here): (&CudaStream, &CudaStream) = (slice.stream(), self.stream.cudarc());
        if home.context().ordinal() != here.context().ordinal() {
            return Err(Error::Place { operation, argument, place: "GPU" });
        }
        // cudarc orders streams among themselves where it tracks buffers; else a buffer stays on its stream.
        if home.cu_stream() != here.cu_stream() && !home.context().is_managing_stream_synchronization() {
            return Err(Error::Place { operation, argument, place: "stream" });
        }
        Ok(())
    }
}

/// A launcher's or query's status as a result.
pub(super) fn launched(operation: &'static str, status: sys::AnabranchStatus) -> Result<()> {
    if status == sys::AnabranchStatus::ANABRANCH_STATUS_OK {
        return Ok(());
    }
    Err(Error::Launch { operation, reason: status_text(status) })
}

fn status_text(status: sys::AnabranchStatus) -> String {
    // SAFETY: the function takes any status and returns a static, terminated string.
    let text = unsafe { CStr::from_ptr(sys::anabranch_status_text(status)) };
    text.to_string_lossy().into_owned()
}

/// Whether an error of CUDA (driver and runtime number them alike) is of a kernel that was running: it comes up in
/// whatever call follows, and makes every later one fail.
pub(super) fn is_from_a_kernel(error: u32) -> bool {
    // ECC, exception of the hardware, illegal address; timeout; assert; stack, instruction, alignment, address space,
    // program counter, unspecified failure.
    matches!(error, 214 | 700 | 702 | 710 | 714..=719)
}

/// An error of the driver, in its words.
pub(super) fn driver(operation: &'static str, error: DriverError) -> Error {
    Error::Driver { operation, reason: reason(error) }
}

/// What the driver says of an error.
pub(super) fn reason(error: DriverError) -> String {
    let text = |words: std::result::Result<&CStr, DriverError>| words.map(|text| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(string)) => format!("{string} ({name})"),
        _ => format!("error {}", error.0 as u32),
    }
}

/// A failed allocation.
pub(super) fn out_of_memory(stream: &Stream, asked: usize, error: DriverError) -> Error {
    // An allocation of more than the address space holds is an invalid value to some drivers.
    let refused = [CUresult::CUDA_ERROR_OUT_OF_MEMORY, CUresult::CUDA_ERROR_INVALID_VALUE].contains(&error.0);
    match stream.device().memory() {
        Ok((free, _)) if refused && asked > free => Error::OutOfMemory { operation: "alloc", asked, free },
        Ok((free, _)) if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            Error::OutOfMemory { operation: "alloc", asked, free }
        }
        _ => stream.driver("alloc", error),
    }
}
