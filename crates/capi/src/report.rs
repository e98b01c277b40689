//! Statuses with sentences: what a function refuses and why, kept for the thread that asked.

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char},
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
};

use anabranch::{
    Error,
    cuda::sys::{self, AnabranchStatus},
};

/// Why a call launched nothing.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) status: AnabranchStatus,
    why: String,
}

impl Refusal {
    pub(crate) fn new(status: AnabranchStatus, why: impl fmt::Display) -> Self {
        Self { status, why: why.to_string() }
    }

    /// A pointer that is missing, or not wanted.
    pub(crate) fn pointer(why: impl fmt::Display) -> Self {
        Self::new(AnabranchStatus::ANABRANCH_STATUS_POINTER, why)
    }

    /// A size or setting.
    pub(crate) fn setting(why: impl fmt::Display) -> Self {
        Self::new(AnabranchStatus::ANABRANCH_STATUS_SETTING, why)
    }

    /// A status in the kernels' words.
    pub(crate) fn of_status(status: AnabranchStatus) -> Self {
        // SAFETY: any status is taken; what comes back is static and terminated.
        let text = unsafe { CStr::from_ptr(sys::anabranch_status_text(status)) };
        Self::new(status, text.to_string_lossy())
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Setting { setting: "arch", .. } | Error::Dtype { .. } => {
                AnabranchStatus::ANABRANCH_STATUS_UNSUPPORTED
            }
            Error::NoGpu { .. } => AnabranchStatus::ANABRANCH_STATUS_NO_GPU,
            Error::Place { .. } => AnabranchStatus::ANABRANCH_STATUS_PLACE,
            Error::Driver { .. } | Error::OutOfMemory { .. } => AnabranchStatus::ANABRANCH_STATUS_CUDA,
            _ => AnabranchStatus::ANABRANCH_STATUS_SETTING,
        };
        Self::new(status, error)
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs the body of a function: what it refuses, or a panic, becomes a status and a sentence.
pub(crate) fn guard(function: &str, body: impl FnOnce() -> Result<(), Refusal>) -> AnabranchStatus {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        Err(Refusal::new(AnabranchStatus::ANABRANCH_STATUS_INTERNAL, "a mistake in this library; please report it"))
    });
    let Err(Refusal { status, why }) = result else {
        return AnabranchStatus::ANABRANCH_STATUS_OK;
    };
    let sentence = CString::new(format!("{function}: {why}")).unwrap_or_default();
    // A thread that is ending keeps no more sentences.
    let _ = LAST.try_with(|last| last.replace(sentence));
    status
}

/// A host pointer that is read or written through.
pub(crate) fn needed<T>(pointer: *const T, argument: &str) -> Result<(), Refusal> {
    if pointer.is_null() {
        return Err(Refusal::pointer(format_args!("{argument} is null")));
    }
    if !pointer.is_aligned() {
        let why = format!("{argument} is not aligned to {} bytes", align_of::<T>());
        return Err(Refusal::new(AnabranchStatus::ANABRANCH_STATUS_ALIGNMENT, why));
    }
    Ok(())
}

crate::declared!(anabranch_last_error() -> *const c_char);

/// The calling thread's last refusal.
#[unsafe(no_mangle)]
pub extern "C" fn anabranch_last_error() -> *const c_char {
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

crate::declared!(anabranch_abi_version() -> i32);

/// The version of the header that this library was built with.
#[unsafe(no_mangle)]
pub extern "C" fn anabranch_abi_version() -> i32 {
    sys::ANABRANCH_ABI_VERSION as i32
}

crate::declared!(anabranch_status_text(AnabranchStatus) -> *const c_char);

/// A sentence on a status.
#[unsafe(no_mangle)]
pub extern "C" fn anabranch_status_text(status: AnabranchStatus) -> *const c_char {
    // SAFETY: any status is taken.
    unsafe { sys::anabranch_status_text(status) }
}

crate::declared!(anabranch_runtime_version() -> i32);

/// The CUDA runtime's version.
#[unsafe(no_mangle)]
pub extern "C" fn anabranch_runtime_version() -> i32 {
    // SAFETY: it reads a constant.
    unsafe { sys::anabranch_runtime_version() }
}

#[cfg(test)]
mod tests {
    use super::{Refusal, anabranch_last_error, guard};
    use anabranch::cuda::sys::AnabranchStatus;
    use std::ffi::CStr;

    fn last() -> String {
        // SAFETY: the string is this thread's, and is read before its next call.
        unsafe { CStr::from_ptr(anabranch_last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn sentences_are_kept_by_thread_until_the_next_refusal() {
        assert_eq!(last(), "");
        assert_eq!(guard("f", || Err(Refusal::pointer("x is null"))), AnabranchStatus::ANABRANCH_STATUS_POINTER);
        assert_eq!(guard("f", || Ok(())), AnabranchStatus::ANABRANCH_STATUS_OK);
        assert_eq!(last(), "f: x is null");
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(last(), ""));
        });
    }

    #[test]
    fn a_panic_is_a_status() {
        assert_eq!(guard("f", || panic!("on purpose")), AnabranchStatus::ANABRANCH_STATUS_INTERNAL);
    }
}
