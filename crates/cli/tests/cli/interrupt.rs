//! Ctrl-C: exit code 1, one line, and nothing half-written.

use crate::support::{Copy, anabranch, interrupt, wait};
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

/// Waits for something that takes moments, and at most a minute.
#[track_caller]
fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what} did not happen within a minute");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn while_it_speaks() {
    let copy = Copy::of("deepseek-v1");
    // Room for an hour of text, and no token that ends it.
    fs::remove_file(copy.path("generation_config.json")).unwrap();
    copy.edit("config.json", |json| {
        json["max_position_embeddings"] = 100_000.into();
        json["eos_token_id"] = serde_json::Value::Null;
    });
    let arguments = ["generate", "--model", copy.argument(), "--prompt", "a", "--max-new-tokens", "90000"];
    let mut child = anabranch(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut text = vec![0];
    stdout.read_exact(&mut text).unwrap();
    interrupt(&child);
    stdout.read_to_end(&mut text).unwrap();
    let run = wait(child);
    assert_eq!((run.code, run.stderr.as_str()), (Some(1), "error: interrupted\n"));
    assert_eq!(text.last(), Some(&b'\n'), "the text is whole lines");
    assert!(std::str::from_utf8(&text).is_ok(), "no half character");
}

#[test]
fn while_it_waits_for_a_prompt() {
    let copy = Copy::of("llama");
    let mut command = anabranch(&["generate", "--model", copy.argument()]);
    command.env("RUST_LOG", "debug").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let stdin = child.stdin.take();
    // The first log line says that the handler is in place.
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("standard input"), "{line}");
    interrupt(&child);
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).unwrap();
    assert_eq!((wait(child).code, rest.as_str()), (Some(1), "error: interrupted\n"));
    drop(stdin);
}

#[test]
fn while_it_writes_a_checkpoint() {
    let copy = Copy::of("llama");
    // A quarter of a gigabyte, in a folder that is watched.
    copy.edit("config.json", |json| json["vocab_size"] = (1 << 20).into());
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("out");
    let arguments = ["init", "--config", copy.argument(), "--out", out.to_str().unwrap()];
    let child = anabranch(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let entries = || fs::read_dir(parent.path()).unwrap().count();
    wait_until("a temporary folder", || entries() > 0);
    interrupt(&child);
    wait(child).failure(1, &["interrupted"]);
    assert_eq!(entries(), 0);
}
