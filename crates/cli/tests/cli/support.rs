//! Running the binary.

use serde_json::Value;
use std::{
    ffi::OsStr,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};
use tempfile::TempDir;

/// What a run left.
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// Checks for success and gives standard output.
    #[track_caller]
    pub(crate) fn success(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    /// Checks that the run failed with this exit code and one sentence that contains all of `words`, and printed nothing.
    #[track_caller]
    pub(crate) fn failure(self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        assert_eq!(self.stdout, "");
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let line = self.stderr.lines().find(|line| line.starts_with("error: "));
        let line = line.unwrap_or_else(|| panic!("no error line in {:?}", self.stderr));
        for word in words {
            assert!(line.contains(word), "{word:?} is not in {line:?}");
        }
        if code == 1 {
            assert_eq!(self.stderr.lines().count(), 1, "one sentence: {}", self.stderr);
        }
    }
}

/// The binary, ready to run without the caller's settings.
pub(crate) fn anabranch<S: AsRef<OsStr>>(arguments: &[S]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anabranch"));
    command.args(arguments).env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Runs to the end with empty standard input.
pub(crate) fn run<S: AsRef<OsStr>>(arguments: &[S]) -> Run {
    finish(anabranch(arguments).output().unwrap())
}

/// Runs to the end with this standard input.
pub(crate) fn run_with_input<S: AsRef<OsStr>>(arguments: &[S], input: &[u8]) -> Run {
    let mut command = anabranch(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A run that fails before it reads closes the pipe, which is its right.
    let _ = child.stdin.take().unwrap().write_all(input);
    wait(child)
}

/// Waits for a run whose streams are pipes.
pub(crate) fn wait(child: Child) -> Run {
    finish(child.wait_with_output().unwrap())
}

fn finish(output: Output) -> Run {
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Folder of a golden checkpoint.
pub(crate) fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(family)
}

/// A golden checkpoint's folder as an argument.
pub(crate) fn golden_argument(family: &str) -> String {
    golden(family).to_str().unwrap().to_owned()
}

/// A copy of a golden checkpoint, to be damaged.
pub(crate) struct Copy {
    folder: TempDir,
}

impl Copy {
    pub(crate) fn of(family: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(golden(family)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        Self { folder }
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    pub(crate) fn argument(&self) -> &str {
        self.folder.path().to_str().unwrap()
    }

    /// Changes a JSON file.
    pub(crate) fn edit(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut json: Value = serde_json::from_slice(&fs::read(self.path(file)).unwrap()).unwrap();
        change(&mut json);
        fs::write(self.path(file), json.to_string()).unwrap();
    }
}

/// Asks a run to stop, as Ctrl-C does.
#[cfg(unix)]
pub(crate) fn interrupt(child: &Child) {
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
}
