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
}

/// The result of an operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Checks the length of a flat buffer.
pub(crate) fn check_len(operation: &'static str, argument: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { operation, argument, expected: format!("{expected} long"), got: got.to_string() })
}
