//! Writing to the standard streams without the panics of `println!`.

use crate::failure::Failure;
use std::io::{self, Write};

/// Writes to standard output at once: text is read as it comes, and a full disk or closed pipe is noticed here.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// Writes a line to standard error. Nobody is left to tell when that fails.
pub(crate) fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}
