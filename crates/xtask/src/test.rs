//! `cargo xtask test`: the gate. Every step runs, whatever the ones before it found, and the end says which failed.

use crate::{
    Failure, candle, capi, deny,
    process::{cargo, root, run as run_process},
    python, toolchain,
};
use std::{
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

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
    Step { name: "kernels", run: kernel_format },
    Step {
        name: "clippy",
        run: || passed(&mut cargo(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"])),
    },
    Step { name: "cuda", run: cuda },
    Step { name: "capi", run: capi::check },
    Step { name: "python", run: python::check },
    Step { name: "docs", run: docs },
    Step { name: "licences", run: deny::check },
    Step {
        name: "tests",
        run: || {
            passed(&mut cargo(["test", "--workspace", "--lib", "--bins", "--tests", "--examples", "--no-fail-fast"]))
        },
    },
    Step { name: "doctests", run: || passed(&mut cargo(["test", "--workspace", "--doc", "--no-fail-fast"])) },
    // Last: candle and its kernels take twenty minutes of a core, the first time.
    Step { name: "candle", run: candle::check },
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

fn passed(command: &mut Command) -> Result<Outcome, Failure> {
    run_process(command).map(|()| Outcome::Passed)
}

fn docs() -> Result<Outcome, Failure> {
    passed(cargo(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
}

/// Formatting of C and CUDA C++ by .clang-format, with the version that the toolchain pins.
fn kernel_format() -> Result<Outcome, Failure> {
    toolchain::ensure()?;
    let mut sources = Vec::new();
    for folder in ["kernels", "crates/capi"] {
        kernel_sources(&root().join(folder), &mut sources)?;
    }
    sources.sort();
    passed(
        Command::new(toolchain::clang_format())
            .current_dir(root())
            .args(["--dry-run", "--Werror", "--style=file"])
            .args(sources),
    )
}

fn kernel_sources(folder: &Path, sources: &mut Vec<PathBuf>) -> Result<(), Failure> {
    let cannot = |error: std::io::Error| Failure::Failed(format!("cannot read {}: {error}", folder.display()));
    for entry in fs::read_dir(folder).map_err(cannot)? {
        let path = entry.map_err(cannot)?.path();
        if path.is_dir() {
            kernel_sources(&path, sources)?;
        } else if ["c", "cu", "cuh", "h"].into_iter().any(|kind| path.extension() == Some(OsStr::new(kind))) {
            sources.push(path);
        }
    }
    Ok(())
}

/// The feature `cuda`: every kernel compiled, the linter over it, its tests. Those that need a GPU run where there is one,
/// else they are shown as ignored.
fn cuda() -> Result<Outcome, Failure> {
    toolchain::ensure()?;
    run_process(&mut cargo(["clippy", "--workspace", "--all-targets", "--features", "cuda", "--", "-D", "warnings"]))?;
    let mut tests =
        cargo(["test", "--workspace", "--features", "cuda", "--lib", "--bins", "--test", "gpu", "--no-fail-fast"]);
    if has_gpu() {
        tests.args(["--", "--include-ignored", "--test-threads", "1"]).env("ANABRANCH_REQUIRE_GPU", "1");
    }
    passed(&mut tests)
}

/// Whether NVIDIA's tool finds a GPU. The tests themselves say what is wrong with one that cannot be used.
pub(crate) fn has_gpu() -> bool {
    let listed = Command::new("nvidia-smi").arg("-L").output();
    listed.is_ok_and(|output| output.status.success() && String::from_utf8_lossy(&output.stdout).contains("GPU "))
}
