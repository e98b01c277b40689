//! Why a command stopped, and the exit code that tells it.

use std::{fmt, io, process::ExitCode};

/// Why a command stopped before its end.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The library refused or failed.
    Model(anabranch_model::Error),
    /// Standard output does not take what is written to it.
    Output(io::Error),
    /// Anything else, in one sentence.
    Failed(String),
}

impl Failure {
    /// Says what happened on stderr and gives the exit code. (Wrong usage is the argument parser's to report, with 2.)
    ///
    /// A reader that closed the pipe (`anabranch ... | head`) has had all it wanted: silence, and success.
    pub(crate) fn report(&self) -> ExitCode {
        if matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        crate::output::complain(&format!("error: {self}"));
        ExitCode::FAILURE
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(message) => f.write_str(message),
            Self::Model(error) => error.fmt(f),
            Self::Output(error) => write!(f, "cannot write to standard output: {error}"),
        }
    }
}

impl From<anabranch::Error> for Failure {
    fn from(error: anabranch::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<anabranch_model::Error> for Failure {
    fn from(error: anabranch_model::Error) -> Self {
        Self::Model(error)
    }
}
