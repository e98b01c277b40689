//! `anabranch doctor`: what this machine has and lacks, for what.

use crate::{disk as disk_space, failure::Failure, output, units};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

/// What this machine has and lacks, and what for
#[derive(clap::Args)]
#[command(
    after_help = "Nothing is changed, and a missing thing is no failure: the processor alone runs everything, slowly."
)]
pub(crate) struct Arguments {}

/// One thing that is there or not.
struct Finding {
    name: &'static str,
    purpose: &'static str,
    /// What there is, or what to do about its absence.
    state: Result<String, String>,
}

pub(crate) fn run(_: &Arguments) -> Result<(), Failure> {
    let mut running = vec![processor(), memory(), disk(), driver()];
    running.extend(kernels());
    let sections = [
        ("Running models", running),
        ("Building with CUDA kernels", vec![nvcc(), libclang(), compiler()]),
        (
            "Working on anabranch",
            vec![
                program("cargo", "", "builds everything", "install Rust from https://rustup.rs"),
                program("cargo-deny", "bin", "checks licences in `cargo xtask test`", "`cargo xtask test` installs it"),
                program(
                    "clang-format",
                    "clang_format/data/bin",
                    "checks the kernels' formatting in `cargo xtask test`",
                    "`cargo xtask toolchain` brings it",
                ),
            ],
        ),
    ];
    let mut text = String::new();
    for (title, findings) in &sections {
        text.push_str(&section(title, findings));
    }
    output::print(&text)
}

fn section(title: &str, findings: &[Finding]) -> String {
    let row = |finding: &Finding| {
        let (state, detail) = match &finding.state {
            Ok(detail) => ("found", detail),
            Err(action) => ("missing", action),
        };
        vec![format!("  {}", finding.name), state.to_owned(), finding.purpose.to_owned(), detail.clone()]
    };
    format!("{title}\n{}\n", units::table(&findings.iter().map(row).collect::<Vec<_>>(), &[]))
}

fn processor() -> Finding {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let plural = if cores == 1 { "" } else { "s" };
    let vectors = vector_instructions();
    let detail = format!(
        "{cores} core{plural}, {}{}{}",
        env::consts::ARCH,
        if vectors.is_empty() { "" } else { ", " },
        vectors.join(", ")
    );
    Finding { name: "processor", purpose: "runs every model in float32", state: Ok(detail) }
}

/// Those that make matrix products fast.
fn vector_instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    let known = [
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("AVX-512", is_x86_feature_detected!("avx512f")),
    ];
    #[cfg(target_arch = "aarch64")]
    let known = [("NEON", true)];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let known: [(&str, bool); 0] = [];
    known.into_iter().filter_map(|(name, present)| present.then_some(name)).collect()
}

fn memory() -> Finding {
    let detail = anabranch_model::memory::available().map_or_else(
        || "amount not known on this system".to_owned(),
        |free| format!("{} available", units::bytes(free)),
    );
    Finding { name: "memory", purpose: "holds the weights and the KV cache", state: Ok(detail) }
}

fn disk() -> Finding {
    let state = disk_space::free(Path::new(".")).map_or_else(
        || Ok("amount not known on this system".to_owned()),
        |free| Ok(format!("{} free in this folder", units::bytes(free))),
    );
    Finding { name: "disk", purpose: "holds checkpoints (`anabranch init` writes one)", state }
}

fn driver() -> Finding {
    let queried = first_line("nvidia-smi", &["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]);
    // Without the tool the kernel module still tells that there is a driver, if not for which GPU.
    let module = || fs::read_to_string("/proc/driver/nvidia/version").ok()?.lines().next().map(str::to_owned);
    let state = match (queried.or_else(module), library("libcuda.so.1")) {
        (Some(gpu), Some(_)) => Ok(gpu),
        (Some(gpu), None) => Err(format!("{gpu}, but no libcuda.so.1: install the driver's user-space libraries")),
        (None, _) => Err("no NVIDIA GPU or driver seen; models run on the processor".to_owned()),
    };
    Finding { name: "GPU", purpose: "runs models with CUDA kernels", state }
}

#[cfg(not(feature = "cuda"))]
fn kernels() -> Vec<Finding> {
    let state = Err("this build runs on the processor only".to_owned());
    vec![Finding { name: "CUDA build", purpose: "lets --device cuda use the GPU", state }]
}

/// Every GPU that the kernels of this build can see, and what they can do there.
#[cfg(feature = "cuda")]
fn kernels() -> Vec<Finding> {
    use anabranch::cuda::Device;
    let finding = |state| Finding { name: "CUDA build", purpose: "lets --device cuda use the GPU", state };
    let mut findings = match Device::count() {
        Err(error) => vec![finding(Err(error.to_string()))],
        Ok(0) => vec![finding(Err("the driver shows no GPU to this process".to_owned()))],
        Ok(count) => (0..count)
            .map(|ordinal| {
                finding(Device::open(ordinal).and_then(|device| usable(ordinal, &device)).map_err(|e| e.to_string()))
            })
            .collect(),
    };
    let state = anabranch::cuda::cublaslt_version().map_err(|error| match error {
        anabranch::Error::NoCublasLt { reason } => format!("{reason}; the kernels' own products take its place"),
        error => error.to_string(),
    });
    findings.push(Finding { name: "cuBLASLt", purpose: "multiplies in the dense parts of long prompts", state });
    findings
}

#[cfg(feature = "cuda")]
fn usable(ordinal: usize, device: &anabranch::cuda::Device) -> anabranch::Result<String> {
    let ((major, minor), (free, total)) = (device.capability(), device.memory()?);
    let path = if (major, minor) == (9, 0) { "Hopper's own instructions for experts" } else { "the portable kernels" };
    Ok(format!(
        "cuda:{ordinal} runs every model in bf16, with {path}: {}, compute capability {major}.{minor}, {} of {} free",
        device.name()?,
        units::bytes(free as u64),
        units::bytes(total as u64)
    ))
}

/// The compiler's places, in the order in which the build looks.
fn nvcc() -> Finding {
    let in_bin = |variable| env::var_os(variable).map(|home| PathBuf::from(home).join("bin").join("nvcc"));
    let named = [env::var_os("NVCC").map(PathBuf::from), in_bin("CUDA_HOME"), in_bin("CUDA_PATH")];
    let places = named.into_iter().chain([Some("nvcc".into()), Some(brought("nvidia/cu13/bin/nvcc"))]);
    let found = places.flatten().find_map(|nvcc| {
        let release = output_of(&nvcc, &["--version"])?
            .lines()
            .find_map(|line| line.split("release ").nth(1).map(str::to_owned))?;
        Some(format!("release {release} ({})", nvcc.display()))
    });
    let state = found.ok_or_else(|| "install the CUDA toolkit 12.8 or newer, or `cargo xtask toolchain`".to_owned());
    Finding { name: "nvcc", purpose: "compiles the kernels", state }
}

fn libclang() -> Finding {
    let named = env::var_os("LIBCLANG_PATH").map(PathBuf::from).filter(|path| path.exists());
    let state = named
        .or_else(|| library("libclang"))
        .or_else(|| Some(brought("clang/native/libclang.so")).filter(|path| path.exists()))
        .map(|path| path.display().to_string())
        .ok_or_else(|| "install libclang (Debian: libclang-dev), or `cargo xtask toolchain`".to_owned());
    Finding { name: "libclang", purpose: "reads the kernels' C header", state }
}

fn compiler() -> Finding {
    let name = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let state = first_line(&name, &["--version"]).ok_or_else(|| "install g++ or clang++, or set CXX".to_owned());
    Finding { name: "C++ compiler", purpose: "is what nvcc calls for the host side", state }
}

/// A program on PATH, or else in the folder `below` what the repository brings.
fn program(name: &'static str, below: &str, purpose: &'static str, action: &str) -> Finding {
    let places = [PathBuf::from(name), brought(below).join(name)];
    let found = places.iter().find_map(|place| first_line(place, &["--version"]));
    Finding { name, purpose, state: found.ok_or_else(|| action.to_owned()) }
}

/// Where `cargo xtask` puts what a machine lacks, seen from the repository's root.
fn brought(path: &str) -> PathBuf {
    Path::new("target/toolchain").join(path)
}

/// The first file of this name, version suffixes included, where the dynamic linker looks.
fn library(name: &str) -> Option<PathBuf> {
    let named = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let fixed =
        ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/local/cuda/compat"].map(PathBuf::from);
    // Debian's folder of the architecture, and its folders of LLVM versions.
    let multiarch = PathBuf::from(format!("/usr/lib/{}-linux-gnu", env::consts::ARCH));
    let llvm = fs::read_dir("/usr/lib").into_iter().flatten().flatten().map(|entry| entry.path());
    let llvm = llvm.filter(|folder| folder.to_string_lossy().contains("/llvm")).map(|folder| folder.join("lib"));
    let mut folders = env::split_paths(&named).filter(|folder| !folder.as_os_str().is_empty()).collect::<Vec<_>>();
    folders.extend(fixed.into_iter().chain([multiarch]).chain(llvm));
    folders.iter().find_map(|folder| in_folder(folder, name))
}

fn in_folder(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries
        .map(|entry| entry.path())
        .find(|path| is_library(&path.file_name().unwrap_or_default().to_string_lossy(), name))
}

/// `libclang.so`, `libclang.so.1` or `libclang-18.so` for `libclang`, but not `libclang-cpp.so`, another library.
fn is_library(file: &str, name: &str) -> bool {
    let Some(rest) = file.strip_prefix(name) else { return false };
    let versioned = rest.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    rest.is_empty() || rest.starts_with(".so") || (versioned && rest.contains(".so"))
}

fn first_line(program: impl AsRef<Path>, arguments: &[&str]) -> Option<String> {
    let line = output_of(program.as_ref(), arguments)?.lines().next()?.trim().to_owned();
    (!line.is_empty()).then_some(line)
}

/// What a program prints, if it is there and succeeds.
fn output_of(program: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_say_what_is_there_and_what_to_do() {
        let findings = [
            Finding { name: "a", purpose: "runs", state: Ok("2 cores".to_owned()) },
            Finding { name: "long name", purpose: "builds", state: Err("install it".to_owned()) },
        ];
        let expected = "Title\n  a          found    runs    2 cores\n  long name  missing  builds  install it\n\n";
        assert_eq!(section("Title", &findings), expected);
    }

    #[test]
    fn absent_programs_are_missing() {
        assert_eq!(output_of(Path::new("/nonexistent/program"), &[]), None);
        assert!(program("anabranch-no-such-program", "", "", "x").state.is_err());
    }

    #[test]
    fn libraries_match_by_name_and_version() {
        for file in ["libclang.so", "libclang.so.18", "libclang-18.so.1"] {
            assert!(is_library(file, "libclang"), "{file}");
        }
        for file in ["libclang-cpp.so.14", "libclang.a", "libclangd.txt", "clang"] {
            assert!(!is_library(file, "libclang"), "{file}");
        }
        assert!(is_library("libcuda.so.1", "libcuda.so.1") && !is_library("libcuda.so", "libcuda.so.1"));
        assert_eq!(in_folder(Path::new("/nonexistent"), "libclang"), None);
    }
}
