//! Ctrl-C: at once where nothing can be left half-done, else after the step in progress.

use crate::{failure::Failure, output};
use std::{
    process,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static DEFERRED: AtomicBool = AtomicBool::new(false);

/// Takes over Ctrl-C and termination. The exit code is 1, and the message `interrupted`.
pub(crate) fn install() -> Result<(), Failure> {
    ctrlc::set_handler(|| {
        // The second request means it, wherever the program stands.
        let again = REQUESTED.swap(true, SeqCst);
        if again || !DEFERRED.load(SeqCst) {
            output::complain(&format!("error: {}", anabranch_model::Error::Interrupted));
            process::exit(1);
        }
    })
    .map_err(|error| Failure::Failed(format!("cannot watch for Ctrl-C: {error}")))
}

/// Whether the user asked to stop.
pub(crate) fn requested() -> bool {
    REQUESTED.load(SeqCst)
}

/// Runs work that looks at [`requested`] itself, and so stops cleanly.
pub(crate) fn deferred<T>(work: impl FnOnce() -> T) -> T {
    DEFERRED.store(true, SeqCst);
    let result = work();
    DEFERRED.store(false, SeqCst);
    result
}
