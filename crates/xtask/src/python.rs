//! The gate's step for `python/`: the package's tests over the C library, and a wheel that is built, installed and
//! imported. `ANABRANCH_PYTHON` names another interpreter than `python3`, such as that of an environment with PyTorch; what
//! needs PyTorch or Transformers is skipped without.

use crate::{
    Failure, capi,
    process::{root, run as run_process, target},
    test::{Outcome, has_gpu},
};
use std::{env, ffi::OsString, fs, path::Path, process::Command};

pub(crate) fn check() -> Result<Outcome, Failure> {
    let interpreter = env::var_os("ANABRANCH_PYTHON").unwrap_or_else(|| OsString::from("python3"));
    if Command::new(&interpreter).args(["-m", "pip", "--version"]).output().is_err() {
        return Ok(Outcome::Skipped("python3 with pip is missing".to_owned()));
    }
    let prefix = target().join("capi");
    capi::install(&prefix)?;
    let library = prefix.join("lib").join(capi::SHARED);
    let python = |path: &Path| {
        let mut command = Command::new(&interpreter);
        command.env("PYTHONPATH", path).env("PYTHONDONTWRITEBYTECODE", "1");
        command
    };
    let mut tests = python(&root().join("python/src"));
    tests.current_dir(root().join("python/tests")).args(["-m", "unittest"]).env("ANABRANCH_LIBRARY", &library);
    if has_gpu() {
        tests.env("ANABRANCH_REQUIRE_GPU", "1");
    }
    run_process(&mut tests)?;

    let wheels = target().join("wheels");
    let _ = fs::remove_dir_all(&wheels);
    let mut pip = Command::new(&interpreter);
    pip.args(["-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--wheel-dir"]).arg(&wheels);
    run_process(pip.arg(root().join("python")).env("ANABRANCH_LIBRARY", &library))?;
    let installed = wheels.join("installed");
    let mut pip = Command::new(&interpreter);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--target"]);
    run_process(pip.arg(&installed).arg("--find-links").arg(&wheels).arg("anabranch"))?;
    // From a folder without sources, and without the variable: the library is the wheel's.
    let words = "import anabranch; print(anabranch.Routing(8, 2), anabranch._library.path())";
    let mut import = python(&installed);
    run_process(import.current_dir(&wheels).env_remove("ANABRANCH_LIBRARY").args(["-c", words]))?;
    Ok(Outcome::Passed)
}
