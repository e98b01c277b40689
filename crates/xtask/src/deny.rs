//! The licence step: cargo-deny, taken from PATH or brought into target/toolchain.

use crate::{
    Failure, candle,
    process::{cargo, root, run, toolchain},
    test::Outcome,
};
use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The release that is brought; deny.toml is written for it.
const VERSION: &str = "0.20.2";
/// The oldest release that reads deny.toml.
const OLDEST: (u32, u32) = (0, 18);

/// Checks licences, bans and sources. A machine that has no cargo-deny and cannot get it skips the step, CI excepted.
pub(crate) fn check() -> Result<Outcome, Failure> {
    let program = match find() {
        Some(program) => program,
        None => match install() {
            Ok(program) => program,
            Err(_) if env::var_os("CI").is_none() => {
                let why = "cargo-deny is not on PATH and cannot be installed here: `cargo install cargo-deny --locked`";
                return Ok(Outcome::Skipped(why.to_owned()));
            }
            Err(failure) => return Err(failure),
        },
    };
    for manifest in ["Cargo.toml", candle::MANIFEST] {
        let mut deny = Command::new(&program);
        deny.current_dir(root()).args(["--manifest-path", manifest]);
        run(deny.args(["check", "--hide-inclusion-graph", "bans", "licenses", "sources"]))?;
    }
    Ok(Outcome::Passed)
}

fn find() -> Option<PathBuf> {
    [PathBuf::from("cargo-deny"), installed()].into_iter().find(|program| version(program).is_some_and(|v| v >= OLDEST))
}

fn installed() -> PathBuf {
    toolchain().join("bin").join(format!("cargo-deny{}", env::consts::EXE_SUFFIX))
}

/// Major and minor version, or nothing if the program is absent.
fn version(program: &Path) -> Option<(u32, u32)> {
    let output = Command::new(program).arg("--version").stderr(Stdio::null()).output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

fn parse_version(line: &str) -> Option<(u32, u32)> {
    let mut parts = line.split_whitespace().nth(1)?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn install() -> Result<PathBuf, Failure> {
    eprintln!("cargo-deny is not installed: building it once, into target/toolchain (some minutes)");
    let folder = toolchain();
    // A build folder of its own: the workspace's lock and profile settings have nothing to do with it.
    run(cargo(["install", "cargo-deny", "--locked", "--version", VERSION, "--root"])
        .arg(&folder)
        .env_remove("CARGO_TARGET_DIR"))?;
    Ok(installed())
}

#[cfg(test)]
mod tests {
    use super::parse_version;

    #[test]
    fn reads_the_version_line() {
        assert_eq!(parse_version("cargo-deny 0.20.2\n"), Some((0, 20)));
        assert_eq!(parse_version("cargo-deny"), None);
        assert_eq!(parse_version("cargo-deny x.y"), None);
    }
}
