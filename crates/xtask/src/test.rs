//! `cargo xtask test`: the gate. Every step runs, whatever the ones before it found, and the end says which failed.

use crate::{
    Failure, deny,
    process::{cargo, run as run_process},
};
use std::time::{Duration, Instant};

/// What became of a step that did not fail.
pub(crate) enum Outcome {
    Passed,
    /// This machine cannot check it; why, and what to do.
    Skipped(String),
}

struct Step {
    name: &'static str,
    run: fn() -> Result<Outcome, Failure>,
}

/// Quick ones first: a formatting slip should not wait for the tests.
const STEPS: &[Step] = &[
    Step { name: "format", run: || passed(&mut cargo(["fmt", "--all", "--check"])) },
    Step {
        name: "clippy",
        run: || passed(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])),
    },
    Step { name: "docs", run: docs },
    Step { name: "licences", run: deny::check },
    Step {
        name: "tests",
        run: || {
            passed(&mut cargo(["test", "--workspace", "--lib", "--bins", "--tests", "--examples", "--no-fail-fast"]))
        },
    },
    Step { name: "doctests", run: || passed(&mut cargo(["test", "--workspace", "--doc", "--no-fail-fast"])) },
];

/// The names that `cargo xtask test NAME ...` takes.
pub(crate) fn step_names() -> Vec<&'static str> {
    STEPS.iter().map(|step| step.name).collect()
}

/// Runs all steps, or those that are named.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    if let Some(unknown) = arguments.iter().find(|name| !step_names().contains(&name.as_str())) {
        return Err(Failure::Usage(format!("there is no step `{unknown}`; the steps are {}", step_names().join(", "))));
    }
    let chosen = |step: &&Step| arguments.is_empty() || arguments.iter().any(|name| name == step.name);
    let mut report = Vec::new();
    let mut failed = Vec::new();
    for step in STEPS.iter().filter(chosen) {
        eprintln!("\n== {}", step.name);
        let start = Instant::now();
        let outcome = (step.run)();
        report.push(line(step.name, start.elapsed(), &outcome));
        if outcome.is_err() {
            failed.push(step.name);
        }
    }
    eprintln!();
    for line in &report {
        println!("{line}");
    }
    if failed.is_empty() {
        println!("\nall {} steps passed or were skipped for the reason shown", report.len());
        return Ok(());
    }
    Err(Failure::Failed(format!("failed: {}", failed.join(", "))))
}

fn line(name: &str, elapsed: Duration, outcome: &Result<Outcome, Failure>) -> String {
    let seconds = elapsed.as_secs_f64();
    match outcome {
        Ok(Outcome::Passed) => format!("{name:<10} passed   {seconds:6.1} s"),
        Ok(Outcome::Skipped(why)) => format!("{name:<10} skipped  {seconds:6.1} s  {why}"),
        Err(Failure::Failed(why) | Failure::Usage(why)) => format!("{name:<10} FAILED   {seconds:6.1} s  {why}"),
    }
}

fn passed(command: &mut std::process::Command) -> Result<Outcome, Failure> {
    run_process(command).map(|()| Outcome::Passed)
}

fn docs() -> Result<Outcome, Failure> {
    passed(cargo(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
}
