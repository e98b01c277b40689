//! The one error type of the operations.

use crate::Dtype;

/// Why an operation refused to run. Every variant says which operation, what was expected and what was given;
/// nothing has been computed or launched when one is returned.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer or matrix does not have the length or shape that the operation needs.
    #[error("{operation}: {argument} must be {expected}, got {got}")]
    Shape {
        /// The operation, by its name in the API.
        operation: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// What was needed, in words.
        expected: String,
        /// What was given.
        got: String,
    },
    /// The operation has no implementation for this data type.
    #[error("{operation}: {argument} has dtype {got}, but only {expected} is supported")]
    Dtype {
        /// The operation, by its name in the API.
        operation: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The supported data types, in words.
        expected: &'static str,
        /// What was given.
        got: Dtype,
    },
    /// A routing, rotary embedding or sampling setting contradicts itself or is out of range.
    #[error("{operation}: {setting} must be {expected}, got {got}")]
    Setting {
        /// The operation, by its name in the API.
        operation: &'static str,
        /// The setting at fault.
        setting: &'static str,
        /// What is allowed, in words.
        expected: String,
        /// What was given.
        got: String,
    },
    /// An id names an expert, token or position that does not exist.
    #[error("{operation}: {argument} holds {got}, but must be below {limit}")]
    Index {
        /// The operation, by its name in the API.
        operation: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// The first value that is out of range.
        limit: usize,
        /// What was given.
        got: i64,
    },
    /// There is no GPU that can be used: no driver, no device of that number, or one that is too old.
    #[error("no usable CUDA GPU: {reason}")]
    NoGpu {
        /// What is missing, in words.
        reason: String,
    },
    /// cuBLASLt is not installed, is switched off, or does not work on this GPU. Nothing needs it: dense products are then the
    /// kernels' own.
    #[error("cuBLASLt is not used: {reason}")]
    NoCublasLt {
        /// What is missing, in words.
        reason: String,
    },
    /// A tensor belongs to another GPU or stream than the operation runs on.
    #[error("{operation}: {argument} was made on another {place} than the operation runs on")]
    Place {
        /// The operation, by its name in the API.
        operation: &'static str,
        /// The argument at fault.
        argument: &'static str,
        /// "GPU" or "stream".
        place: &'static str,
    },
    /// The GPU's memory does not suffice.
    #[error("{operation}: the GPU has {free} bytes of free memory, but {asked} are needed")]
    OutOfMemory {
        /// The operation, by its name in the API.
        operation: &'static str,
        /// Bytes asked for.
        asked: usize,
        /// Bytes that were free then.
        free: usize,
    },
    /// The host's memory does not suffice, or the system does not let so much of it be page-locked.
    #[error("{operation}: the system refuses {asked} bytes of page-locked memory")]
    OutOfHostMemory {
        /// The operation, by its name in the API.
        operation: &'static str,
        /// Bytes asked for.
        asked: usize,
    },
    /// The launch of a kernel failed, or its launcher refused the arguments.
    #[error("{operation}: the kernel was not launched: {reason}")]
    Launch {
        /// The operation, by its name in the API.
        operation: &'static str,
        /// What the launcher says.
        reason: String,
    },
    /// A launch before this call failed while it ran. The GPU's context is lost: this process cannot use it again.
    #[error(
        "a kernel failed on the GPU: {reason}; {operation} met the error, and what was launched before it, newest first, \
         is {}; CUDA_LAUNCH_BLOCKING=1 makes the newest the one that failed",
        names(launched)
    )]
    Earlier {
        /// The operation during which the error came up; it is not at fault.
        operation: &'static str,
        /// What was launched on the stream since it was last waited for, newest first, each operation once.
        launched: Vec<&'static str>,
        /// What the driver says.
        reason: String,
    },
    /// The CUDA driver reports an error.
    #[error("{operation}: the CUDA driver reports {reason}")]
    Driver {
        /// The operation during which it was met.
        operation: &'static str,
        /// What the driver says.
        reason: String,
    },
}

/// The result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn names(operations: &[&str]) -> String {
    if operations.is_empty() { "not on this stream".to_owned() } else { operations.join(", ") }
}

/// Checks the length of a flat buffer.
pub(crate) fn check_len(operation: &'static str, argument: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { operation, argument, expected: format!("{expected} long"), got: got.to_string() })
}
