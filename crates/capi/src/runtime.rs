//! The few questions to the CUDA runtime, whose static library comes with the kernels: which GPU is current, whose a
//! stream is, and where memory lies.

use std::ffi::c_void;

use anabranch::cuda::sys::{AnabranchStatus, AnabranchStream};

use crate::report::Refusal;

/// `cudaPointerAttributes`, with room for what later releases append.
#[repr(C)]
struct Attributes {
    kind: i32,
    device: i32,
    device_pointer: *mut c_void,
    host_pointer: *mut c_void,
    more: [u64; 16],
}

/// `cudaMemoryTypeDevice` and `cudaMemoryTypeManaged`.
const DEVICE: i32 = 2;
const MANAGED: i32 = 3;

unsafe extern "C" {
    fn cudaGetDevice(device: *mut i32) -> i32;
    fn cudaStreamIsCapturing(stream: AnabranchStream, status: *mut i32) -> i32;
    fn cudaStreamGetDevice(stream: AnabranchStream, device: *mut i32) -> i32;
    fn cudaPointerGetAttributes(attributes: *mut Attributes, pointer: *const c_void) -> i32;
    fn cudaGetLastError() -> i32;
}

/// An error of the runtime as a refusal. What the runtime remembers of it is cleared: it is told here.
fn told(error: i32) -> Result<(), Refusal> {
    if error == 0 {
        return Ok(());
    }
    // SAFETY: it takes and touches nothing of ours.
    unsafe { cudaGetLastError() };
    let base = AnabranchStatus::ANABRANCH_STATUS_CUDA.0;
    Err(Refusal::of_status(AnabranchStatus(base + error.unsigned_abs())))
}

/// The calling thread's GPU.
pub(crate) fn current_device() -> Result<i32, Refusal> {
    let mut device = 0;
    // SAFETY: it writes one int.
    told(unsafe { cudaGetDevice(&raw mut device) })?;
    Ok(device)
}

/// Refuses another GPU's stream. The default streams, which are no pointers, belong to the current GPU.
pub(crate) fn check_stream(stream: AnabranchStream, device: i32) -> Result<(), Refusal> {
    if stream.addr() <= 2 {
        return Ok(());
    }
    let mut capturing = 0;
    // SAFETY: the stream is a live one, as the header asks; the function writes one int.
    told(unsafe { cudaStreamIsCapturing(stream, &raw mut capturing) })?;
    // The question below would end the capture.
    if capturing != 0 {
        return Ok(());
    }
    let mut home = device;
    // SAFETY: the stream is a live one, as the header asks; the function writes one int.
    let asked = unsafe { cudaStreamGetDevice(stream, &raw mut home) };
    // A driver that is older than this question goes unasked.
    if told(asked).is_err() || home == device {
        return Ok(());
    }
    Err(place(format_args!("the stream is on GPU {home}, but the plan was made for GPU {device}")))
}

/// Refuses memory that is not this GPU's.
pub(crate) fn check_memory(argument: &str, pointer: *const c_void, device: i32) -> Result<(), Refusal> {
    let null = std::ptr::null_mut();
    let mut attributes = Attributes { kind: 0, device: 0, device_pointer: null, host_pointer: null, more: [0; 16] };
    // SAFETY: it writes the structure, which is at least as large as its own; any address may be asked for.
    told(unsafe { cudaPointerGetAttributes(&raw mut attributes, pointer) })?;
    match attributes.kind {
        MANAGED => Ok(()),
        DEVICE if attributes.device == device => Ok(()),
        DEVICE => Err(place(format_args!("{argument} is on GPU {}, not on GPU {device}", attributes.device))),
        _ => Err(place(format_args!("{argument} is not memory of a GPU"))),
    }
}

pub(crate) fn place(why: impl std::fmt::Display) -> Refusal {
    Refusal::new(AnabranchStatus::ANABRANCH_STATUS_PLACE, why)
}
