//! Help, exit codes and options that make no sense.

use crate::support::run;

const COMMANDS: [&str; 7] = ["generate", "logits", "route", "inspect", "init", "bench", "doctor"];

#[test]
fn help_names_every_command() {
    let text = run(&["--help"]).success();
    for command in COMMANDS {
        assert!(text.contains(&format!("\n  {command} ")), "{command} in {text}");
    }
    assert!(text.contains("Exit codes: 0 done, 1 failed, 2 wrong usage"), "{text}");
}

#[test]
fn every_command_has_help_with_an_example_or_a_note() {
    for command in COMMANDS {
        let text = run(&[command, "--help"]).success();
        assert!(text.contains(&format!("Usage: anabranch {command}")), "{text}");
        assert!(text.trim_end().lines().count() > 6, "{text}");
    }
}

#[test]
fn version_is_the_packages() {
    assert_eq!(run(&["--version"]).success(), format!("anabranch {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn wrong_usage_is_exit_code_2() {
    run(&["no-such-command"]).failure(2, &["no-such-command"]);
    run(&["doctor", "--no-such-option"]).failure(2, &["--no-such-option"]);
    let nothing = run::<&str>(&[]);
    assert_eq!(nothing.code, Some(2));
    assert!(nothing.stderr.contains("Usage: anabranch"), "{}", nothing.stderr);
}
