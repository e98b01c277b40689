//! Writing: to the standard streams without the panics of `println!`, to files whole or not at all.

use crate::{failure::Failure, interrupt};
use anabranch_model::{Error, write_whole};
use std::{
    fs::File,
    io::{self, Write},
    path::Path,
};

/// Writes to standard output at once: text is read as it comes, and a full disk or closed pipe is noticed here.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(Failure::Output)
}

/// Writes a line to standard error. Nobody is left to tell when that fails.
pub(crate) fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Writes text to a file. Ctrl-C waits for its end.
pub(crate) fn file(path: &Path, text: &str) -> Result<(), Failure> {
    let fill = |mut file: &File| file.write_all(text.as_bytes()).map_err(Error::io("write", path));
    interrupt::deferred(|| write_whole(path, fill))?;
    if interrupt::requested() { Err(Error::Interrupted.into()) } else { Ok(()) }
}

/// Writes a value to a file, as JSON for people.
#[cfg(feature = "cuda")]
pub(crate) fn json(path: &Path, value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(value);
    let text = text.map_err(|error| Failure::Failed(format!("cannot write {}: {error}", path.display())))?;
    file(path, &format!("{text}\n"))
}
