//! The model crate's error type.

use std::{io, path::PathBuf};

/// Why a model could not be loaded or run. Each prints as one sentence that says where the fault is.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration is missing, malformed, or asks for something this crate does not do.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The file, or the preset's name.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A checkpoint's files do not hold what they should.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The tokenizer or its chat template cannot be used.
    #[error("{}: {problem}", path.display())]
    Tokenizer {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The caller's request cannot be met: a prompt, an option, token ids.
    #[error("{0}")]
    Input(String),
    /// The run would need more memory than there is.
    #[error("{what} needs {} of memory, but {} is available", gib(*needed), gib(*available))]
    Memory {
        /// What the memory is for.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes available.
        available: u64,
    },
    /// The GPU's memory does not suffice.
    #[error("{what} needs {} of GPU memory, but {} is free: {advice}", gib(*needed), gib(*free))]
    GpuMemory {
        /// What the memory is for.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// What would fit.
        advice: String,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// "read", "write", "create", ...
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// An operation refused its arguments.
    #[error(transparent)]
    Operation(#[from] anabranch::Error),
}

impl Error {
    /// For `map_err` on file operations.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}

/// The result of a model operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn gib(bytes: u64) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    let mib = bytes as f64 / MIB;
    if mib < 1024.0 { format!("{mib:.1} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}
