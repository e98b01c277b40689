//! `anabranch doctor`.

use crate::support::{anabranch, run};

#[test]
fn names_what_is_there_and_what_to_do() {
    let text = run(&["doctor"]).success();
    for name in ["processor", "memory", "disk", "GPU", "nvcc", "libclang", "cargo-deny", "clang-format"] {
        let line = text.lines().find(|line| line.trim_start().starts_with(name));
        let line = line.unwrap_or_else(|| panic!("no line for {name} in {text}"));
        assert!(line.contains(" found ") || line.contains(" missing "), "{line}");
    }
    assert!(text.lines().any(|line| line.contains("processor") && line.contains("core")), "{text}");
}

#[test]
fn says_what_a_bare_machine_lacks() {
    let output = anabranch(&["doctor"]).env_clear().output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let line = text.lines().find(|line| line.contains("cargo-deny")).unwrap();
    assert!(line.contains("missing") && line.contains("cargo xtask test"), "{line}");
}
