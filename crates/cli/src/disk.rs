//! Free disk space.

use std::path::Path;

/// Bytes that this user can still write in a folder; `None` where that is unknown.
#[cfg(unix)]
pub(crate) fn free(folder: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(folder).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

/// Bytes that this user can still write in a folder; `None` where that is unknown.
#[cfg(not(unix))]
pub(crate) fn free(_: &Path) -> Option<u64> {
    None
}
