//! Feature `cuda`: compiles `kernels/**/*.cu` into one static library and binds `kernels/include/anabranch.h`.
//! Without the feature nothing happens, and nothing is needed.

#[cfg(feature = "cuda")]
mod bind;
#[cfg(feature = "cuda")]
mod kernels;
#[cfg(feature = "cuda")]
mod locate;
#[cfg(feature = "cuda")]
mod names;
#[cfg(feature = "cuda")]
mod targets;

#[cfg(feature = "cuda")]
fn main() -> std::process::ExitCode {
    // Bindings are made by this program run a second time, see `bind`.
    let result = match std::env::var_os(bind::CHILD) {
        Some(header) => bind::child(header.as_ref()),
        None => build(),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(feature = "cuda")]
fn build() -> Result<(), String> {
    use std::{env, path::PathBuf};

    println!("cargo::rerun-if-changed=kernels");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP", "LIBCLANG_PATH", "DOCS_RS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = env::var_os("OUT_DIR").map(PathBuf::from).ok_or("OUT_DIR is not set: this program is run by cargo")?;
    let target = target_folder(&out);
    let toolchain = target.join("toolchain");
    bind::bind(&toolchain, &out)?;
    // Documentation needs the bindings, which need no CUDA, and links nothing.
    if env::var_os("DOCS_RS").is_some() {
        return Ok(());
    }
    let nvcc = locate::Nvcc::find(&toolchain)?;
    println!("cargo::rerun-if-changed={}", nvcc.path.display());
    let targets = targets::Targets::from_env(env::var("CUDA_COMPUTE_CAP").ok().as_deref())?;
    kernels::compile(&nvcc, &targets, &target.join("kernels"), &out)
}

/// The workspace's target folder: cargo does not tell its name, but marks it where it made it, and keeps what it knows of
/// the compiler there.
#[cfg(feature = "cuda")]
fn target_folder(out: &std::path::Path) -> std::path::PathBuf {
    let marked =
        |folder: &&std::path::Path| ["CACHEDIR.TAG", ".rustc_info.json"].iter().any(|mark| folder.join(mark).is_file());
    out.ancestors().find(marked).unwrap_or(out).to_path_buf()
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("cargo::rerun-if-changed=build");
}
