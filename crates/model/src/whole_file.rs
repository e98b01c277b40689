//! Files that appear whole or not at all.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// Writes a file with what `fill` gives it.
///
/// The bytes go to a temporary file in the same folder, reach the disk, and only then take the name `path`: whatever
/// happens, `path` is either what it was or the whole new file. A device or a pipe is written as it stands.
///
/// # Errors
/// [`Error::Io`] if the folder, the disk or the pipe refuses, and whatever `fill` returns. The temporary file is gone in each case.
pub fn write_whole(path: &Path, fill: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let target = target(path);
    if is_device(&target) {
        let out = OpenOptions::new().write(true).open(&target).map_err(Error::io("open", path))?;
        return fill(&out);
    }
    let (temporary, file) = Temporary::create(&target)?;
    fill(&file)?;
    file.sync_all().map_err(Error::io("write", path))?;
    drop(file);
    temporary.persist(&target)
}

/// Finds out whether [`write_whole`] could begin, for work that is long before it writes.
///
/// # Errors
/// [`Error::Io`] if `path` is a folder, or no file can be made beside it.
pub fn check_writable(path: &Path) -> Result<()> {
    let target = target(path);
    if target.is_dir() {
        return Err(Error::io("write", path)(io::ErrorKind::IsADirectory.into()));
    }
    if is_device(&target) { Ok(()) } else { Temporary::create(&target).map(drop) }
}

/// Renaming onto a link would replace it; it is followed, so that it stays one.
fn target(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}

/// Renaming onto a device or a named pipe would replace it, too.
fn is_device(target: &Path) -> bool {
    fs::metadata(target).is_ok_and(|kind| !kind.is_file() && !kind.is_dir())
}

/// A file's name while it is being written; removes the file unless it was persisted.
struct Temporary {
    path: Option<PathBuf>,
}

impl Temporary {
    /// Creates an empty file beside `target`, under a name that no other writer has.
    fn create(target: &Path) -> Result<(Self, File)> {
        let refused = |why: &str| Error::io("create", target)(io::Error::new(io::ErrorKind::InvalidInput, why));
        let name = target.file_name().ok_or_else(|| refused("not the name of a file"))?;
        for attempt in 0u32.. {
            let mut hidden = OsString::from(".");
            hidden.push(name);
            hidden.push(format!(".{}.{attempt}.tmp", std::process::id()));
            let path = target.with_file_name(hidden);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok((Self { path: Some(path) }, file)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("create", target)(error)),
            }
        }
        Err(refused("every temporary name beside it is taken"))
    }

    fn persist(mut self, target: &Path) -> Result<()> {
        if let Some(path) = &self.path {
            fs::rename(path, target).map_err(Error::io("write", target))?;
            self.path = None;
        }
        // The name itself reaches the disk with its folder. Not every system can do that, and the file is whole anyway.
        if let Some(folder) = target.parent().and_then(|folder| File::open(folder).ok()) {
            let _ = folder.sync_all();
        }
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Nothing more can be done about a file that cannot be removed; the error that led here is the one to show.
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(folder: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    fn put(text: &str) -> impl FnOnce(&File) -> Result<()> + '_ {
        move |mut file| file.write_all(text.as_bytes()).map_err(Error::io("write", "it"))
    }

    #[test]
    fn a_file_is_replaced_or_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.txt");
        write_whole(&path, put("first")).unwrap();
        write_whole(&path, put("second")).unwrap();
        let half = |file: &File| put("half")(file).and(Err(Error::Interrupted));
        assert!(matches!(write_whole(&path, half), Err(Error::Interrupted)));
        check_writable(&path).unwrap();
        check_writable(&folder.path().join("other.txt")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        assert_eq!(names(folder.path()), ["out.txt"]);
    }

    #[test]
    fn what_no_file_can_be_is_found_before_the_work() {
        let folder = tempfile::tempdir().unwrap();
        let refused = |path: &Path, words: &str| {
            let error = check_writable(path).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        refused(folder.path(), "directory");
        refused(&folder.path().join("no/such/folder"), "no/such/folder");
        refused(Path::new(".."), "directory");
        assert!(names(folder.path()).is_empty());
    }
}
