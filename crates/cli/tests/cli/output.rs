//! Standard output that does not take everything.

use crate::support::{anabranch, wait};
use std::{fs::File, process::Stdio};

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_a_failure() {
    for arguments in [&["inspect", "--model", "deepseek-v3"][..], &["doctor"], &["--help"], &["inspect", "--help"]] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let child = anabranch(arguments).stdout(full).stderr(Stdio::piped()).spawn().unwrap();
        wait(child).failure(1, &["cannot write to standard output", "space"]);
    }
}

#[test]
fn a_closed_pipe_ends_the_run_quietly() {
    for arguments in [&["inspect", "--model", "deepseek-v3", "--json"][..], &["doctor"], &["--help"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let child = anabranch(arguments).stdout(writer).stderr(Stdio::piped()).spawn().unwrap();
        let run = wait(child);
        assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
}

#[test]
fn a_closed_stderr_changes_no_exit_code() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let status =
        anabranch(&["inspect", "--model", "no-such-model"]).stdout(Stdio::null()).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(1));
}
