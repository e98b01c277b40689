//! `cargo xtask toolchain`: brings nvcc, libclang and clang-format from `PyPI` into target/toolchain, where they are missing.
//! That folder can be deleted at any time.

#[path = "../../../build/locate.rs"]
mod locate;

use crate::{Failure, process};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

pub(crate) use locate::Nvcc;

/// What is brought. Pinned: the same tools on every machine, and clang-format's opinion changes between versions.
const PACKAGES: &[&str] =
    &["cuda-toolkit[nvcc,cccl,cudart,crt,nvvm]==13.0.2", "libclang==18.1.1", "clang-format==23.1.5"];

/// What of it is kept: the folders that the packages make.
const PARTS: &[&str] = &["nvidia", "clang", "clang_format"];

/// The command.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    if !arguments.is_empty() {
        return Err(Failure::Usage("`toolchain` takes no arguments".to_owned()));
    }
    ensure()?;
    let nvcc = Nvcc::find(&process::toolchain()).map_err(Failure::Failed)?;
    println!("nvcc          {nvcc}");
    println!(
        "libclang      {}",
        libclang().map_or("by bindgen's own search".to_owned(), |path| path.display().to_string())
    );
    println!("clang-format  {}", clang_format().display());
    Ok(())
}

/// Makes sure that the feature `cuda` can be built and kernels formatted: an nvcc that the build script would take,
/// libclang, and the pinned clang-format.
pub(crate) fn ensure() -> Result<(), Failure> {
    let toolchain = process::toolchain();
    let nvcc = Nvcc::find(&toolchain);
    // A variable that leads nowhere is for its owner to mend: what is brought would not be used.
    let named = ["NVCC", "CUDA_HOME", "CUDA_PATH"].iter().any(|name| env::var_os(name).is_some_and(|v| !v.is_empty()));
    if let (Err(message), true) = (&nvcc, named) {
        return Err(Failure::Failed(message.clone()));
    }
    if nvcc.is_ok() && libclang().is_some() && clang_format().is_file() {
        return Ok(());
    }
    bring(&toolchain)
}

/// The pinned clang-format.
pub(crate) fn clang_format() -> PathBuf {
    process::toolchain().join("clang_format/data/bin/clang-format")
}

/// libclang as `LIBCLANG_PATH` names it or as it was brought. The system's is not looked for: asking for it takes a linker's
/// knowledge, and bringing it costs 30 MB.
fn libclang() -> Option<PathBuf> {
    let named = env::var_os("LIBCLANG_PATH").filter(|path| !path.is_empty()).map(PathBuf::from);
    named.or_else(|| Some(locate::toolchain_libclang(&process::toolchain())).filter(|path| path.is_file()))
}

/// The folder that libclang is looked for in, if it is known.
pub(crate) fn libclang_folder() -> Option<PathBuf> {
    libclang().map(|path| if path.is_file() { path.parent().unwrap_or(&path).to_path_buf() } else { path })
}

/// Installs everything into a folder beside the final one and renames its parts: what is there is whole.
fn bring(toolchain: &Path) -> Result<(), Failure> {
    let fresh = toolchain.with_extension(format!("new-{}", std::process::id()));
    let failed = |error: std::io::Error| Failure::Failed(format!("cannot fill {}: {error}", toolchain.display()));
    let _ = fs::remove_dir_all(&fresh);
    let result = fs::create_dir_all(&fresh).and_then(|()| fs::create_dir_all(toolchain)).map_err(failed);
    let result = result.and_then(|()| install(&fresh, PACKAGES)).and_then(|()| {
        for part in PARTS {
            let _ = fs::remove_dir_all(toolchain.join(part));
            fs::rename(fresh.join(part), toolchain.join(part)).map_err(failed)?;
        }
        Ok(())
    });
    let _ = fs::remove_dir_all(&fresh);
    result
}

/// `pip install --target` of some packages. Where python has no pip but can make a virtual environment, that one's pip.
pub(crate) fn install(into: &Path, packages: &[&str]) -> Result<(), Failure> {
    let quiet = |command: &mut Command| {
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let python = ["python3", "python"]
        .into_iter()
        .find(|python| quiet(Command::new(python).arg("--version")))
        .ok_or_else(|| missing("python 3 with pip"))?;
    let environment = into.with_extension("venv");
    let mut pip = if quiet(Command::new(python).args(["-m", "pip", "--version"])) {
        Command::new(python)
    } else if quiet(Command::new(python).args(["-m", "venv"]).arg(&environment)) {
        Command::new(environment.join("bin/python"))
    } else {
        return Err(missing("python's pip (Debian's package python3-pip)"));
    };
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--no-compile"]);
    let result = process::run(pip.arg("--target").arg(into).args(packages));
    let _ = fs::remove_dir_all(environment);
    result
}

fn missing(what: &str) -> Failure {
    Failure::Failed(format!(
        "nvcc, libclang or clang-format is missing and comes from PyPI, for which {what} is needed; install that, or CUDA \
         toolkit 12.8 or newer with CUDA_HOME set, and libclang with LIBCLANG_PATH set"
    ))
}
