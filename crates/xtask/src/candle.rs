//! `cargo xtask candle`, the gate's last step: formats, lints, documents and tests `crates/candle`, which stands outside of the
//! workspace; and `cargo xtask stage`'s part of it.
//!
//! candle's `cuda` feature compiles many kernels (minutes, the first time) and links cuBLAS, cuRAND, NVRTC, the CUDA runtime and the
//! driver. The first four come from `PyPI` into target/toolchain/candle; for the driver a stub is made there from cuda.h,
//! enough to link and to start: it answers that there is no GPU. Where `nvidia-smi` finds one, the driver itself is used and
//! the GPU tests run.

use crate::{
    Failure,
    process::{cargo, run as run_process, target, toolchain as toolchain_folder},
    stage::{build, copy, pack},
    test::{Outcome, has_gpu},
    toolchain,
};
use std::{
    collections::BTreeSet,
    env, fs,
    num::NonZero,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

/// Libraries of the toolkit's release, by the names that programs load.
const PACKAGES: &[&str] = &["cuda-toolkit[cublas,cudart,curand,nvrtc]==13.0.2"];
const LIBRARIES: &[&str] = &["libcublas.so", "libcublasLt.so", "libcudart.so", "libcurand.so", "libnvrtc.so"];
/// What candle's kernels are compiled for where no GPU tells: one architecture, as candle has it.
const COMPUTE_CAP: &str = "90";

pub(crate) const MANIFEST: &str = "crates/candle/Cargo.toml";

/// Programs for a GPU host, as (cargo's subcommand and arguments, target's kind and name in cargo's messages, name there).
const PROGRAMS: &[(&str, &[&str], &str, &str, &str)] = &[
    ("test", &["--no-run", "--test", "gpu"], "test", "gpu", "tests"),
    ("build", &["--example", "bench_moe"], "example", "bench_moe", "bench_moe"),
    ("build", &["--example", "qwen3_moe"], "example", "qwen3_moe", "qwen3_moe"),
];
/// Their folder in the stage, and their archive's name.
const PACKED: &str = "candle";

/// The command.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    if let Some(argument) = arguments.first() {
        return Err(Failure::Usage(format!("`candle` takes no arguments, got `{argument}`")));
    }
    check().map(drop)
}

/// The gate's step. Tests that need a GPU are compiled everywhere and run where there is one. All calls of cargo share one
/// profile and one environment, so that candle's kernels are compiled once.
pub(crate) fn check() -> Result<Outcome, Failure> {
    run_process(&mut cargo(["fmt", "--manifest-path", MANIFEST, "--check"]))?;
    let libraries = Libraries::ensure()?;
    run_process(libraries.cargo("clippy")?.args(["--all-targets", "--", "-D", "warnings"]))?;
    run_process(libraries.cargo("doc")?.arg("--no-deps").env("RUSTDOCFLAGS", "-D warnings"))?;
    let mut tests = libraries.cargo("test")?;
    tests.arg("--no-fail-fast");
    if has_gpu() {
        tests.args(["--", "--include-ignored", "--test-threads", "1"]);
    }
    run_process(&mut tests)?;
    Ok(Outcome::Passed)
}

/// Puts the programs for `run.sh candle` into a stage. Each holds all of candle's kernels, 50 MB; packed together, they are
/// 8 MB.
pub(crate) fn stage(folder: &Path) -> Result<(), Failure> {
    let libraries = Libraries::ensure()?;
    for (subcommand, arguments, kind, name, staged) in PROGRAMS {
        let program = build(libraries.cargo(subcommand)?.args(*arguments), kind, name)?;
        copy(&program, &folder.join(PACKED).join(staged))?;
    }
    pack(folder, PACKED)
}

/// Where the libraries are that candle links.
struct Libraries {
    /// Those to load.
    loaded: PathBuf,
    /// The same without version numbers, as a linker asks for them, and the driver's stub.
    linked: PathBuf,
}

impl Libraries {
    fn ensure() -> Result<Self, Failure> {
        toolchain::ensure()?;
        let folder = toolchain_folder().join("candle");
        let this = Self { loaded: folder.join("nvidia/cu13/lib"), linked: folder.join("link") };
        if !this.linked.join("libcuda.so").is_file() {
            // What an interrupted call left there, pip would keep.
            let _ = fs::remove_dir_all(&folder);
            toolchain::install(&folder, PACKAGES)?;
            this.link()?;
        }
        Ok(this)
    }

    fn link(&self) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure::Failed(format!("cannot fill {}: {error}", self.linked.display()));
        fs::create_dir_all(&self.linked).map_err(failed)?;
        for entry in fs::read_dir(&self.loaded).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(library) = LIBRARIES.iter().find(|library| name.starts_with(&format!("{library}."))) {
                let at = self.linked.join(library);
                let _ = fs::remove_file(&at);
                // A linker follows what is named, and writes into the program the name that the library gives itself.
                fs::write(&at, format!("INPUT({})\n", path.display())).map_err(failed)?;
            }
        }
        let header = self.loaded.with_file_name("include").join("cuda.h");
        let text = fs::read_to_string(&header)
            .map_err(|error| Failure::Failed(format!("cannot read {}: {error}", header.display())))?;
        let source = self.linked.join("libcuda.c");
        fs::write(&source, stub(&text)).map_err(failed)?;
        // What programs load, then the name that linkers ask for: the last, so that it stands for all.
        for name in ["libcuda.so.1", "libcuda.so"] {
            let mut gcc = Command::new("gcc");
            gcc.args(["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o"]).arg(self.linked.join(name));
            run_process(gcc.arg(&source))?;
        }
        Ok(())
    }

    /// A command of cargo for the crate.
    fn cargo(&self, subcommand: &str) -> Result<Command, Failure> {
        let mut command = cargo([subcommand, "--manifest-path", MANIFEST, "--release"]);
        self.environment(&mut command).map(|()| command)
    }

    /// What cargo, candle's build scripts, the linker and the tests are told.
    fn environment(&self, command: &mut Command) -> Result<(), Failure> {
        let nvcc = toolchain::Nvcc::find(&toolchain_folder()).map_err(Failure::Failed)?;
        let home = nvcc.path.ancestors().nth(2).unwrap_or(Path::new("/")).to_path_buf();
        let paths = |variable: &str, first: &[&Path]| {
            let rest = env::var_os(variable).unwrap_or_default();
            let all = first.iter().map(|path| path.to_path_buf()).chain(env::split_paths(&rest));
            env::join_paths(all.filter(|path| !path.as_os_str().is_empty()))
                .map_err(|error| Failure::Failed(format!("{variable}: {error}")))
        };
        let mut load: Vec<&Path> = vec![&self.loaded];
        if !has_gpu() {
            load.push(&self.linked);
        }
        command
            .env("CUDA_HOME", &home)
            .env("NVCC", &nvcc.path)
            .env("PATH", paths("PATH", &[&home.join("bin")])?)
            .env("LIBRARY_PATH", paths("LIBRARY_PATH", &[&self.linked])?)
            .env("LD_LIBRARY_PATH", paths("LD_LIBRARY_PATH", &load)?)
            .env("CARGO_TARGET_DIR", target().join("candle"));
        // candle's kernels are nearly all of the first build; unasked, its build script compiles them on half of the cores.
        if env::var_os("CUDAFORGE_THREADS").is_none() {
            command.env("CUDAFORGE_THREADS", thread::available_parallelism().map_or(1, NonZero::get).to_string());
        }
        if env::var_os("CUDA_COMPUTE_CAP").is_none() && !has_gpu() {
            command.env("CUDA_COMPUTE_CAP", COMPUTE_CAP);
        }
        if let Some(libclang) = toolchain::libclang_folder() {
            command.env("LIBCLANG_PATH", libclang);
        }
        Ok(())
    }
}

/// C text of a driver that has every function which cuda.h names, and no GPU.
fn stub(header: &str) -> String {
    let words = header.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    let functions: BTreeSet<&str> = words
        .filter(|word| word.starts_with("cu") && word[2..].starts_with(|c: char| c.is_ascii_uppercase()))
        .collect();
    // CUDA_ERROR_NO_DEVICE
    functions.into_iter().fold(String::new(), |text, name| text + "int " + name + "(void) { return 100; }\n")
}

#[cfg(test)]
mod tests {
    use super::stub;

    #[test]
    fn a_stub_has_each_function_once() {
        let header = "#define cuFree cuFree_v2\nCUresult CUDAAPI cuInit(unsigned int);\nCUresult cuInit(int cuda);";
        let expected =
            "int cuFree(void) { return 100; }\nint cuFree_v2(void) { return 100; }\nint cuInit(void) { return 100; }\n";
        assert_eq!(stub(header), expected);
    }
}
