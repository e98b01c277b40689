//! Where nvcc and libclang are. Shared by `build.rs` and `cargo xtask`, so that both find the same ones.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
};

/// The oldest toolkit whose nvcc is accepted, as (major, minor).
pub(crate) const OLDEST_NVCC: (u32, u32) = (12, 8);

/// What to do about a missing compiler, said once.
pub(crate) const HOW_TO_INSTALL: &str = "run `cargo xtask toolchain`, which brings nvcc and libclang into \
    target/toolchain, or install CUDA toolkit 12.8 or newer and libclang, and set CUDA_HOME (or NVCC) and LIBCLANG_PATH";

/// An nvcc that runs.
#[derive(Debug, Clone)]
pub(crate) struct Nvcc {
    /// The program.
    pub(crate) path: PathBuf,
    /// Its release, as (major, minor).
    pub(crate) version: (u32, u32),
}

impl fmt::Display for Nvcc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}.{})", self.path.display(), self.version.0, self.version.1)
    }
}

impl Nvcc {
    /// The first nvcc of `NVCC`, `CUDA_HOME`, `CUDA_PATH`, PATH and `toolchain`. A variable that is set is meant: what it
    /// names is taken or refused, never passed over.
    pub(crate) fn find(toolchain: &Path) -> Result<Self, String> {
        let in_folder = |variable: &'static str| {
            let folder = env::var_os(variable).filter(|value| !value.is_empty())?;
            Some((variable, Path::new(&folder).join("bin/nvcc")))
        };
        let named = env::var_os("NVCC").filter(|value| !value.is_empty()).map(|path| ("NVCC", PathBuf::from(path)));
        if let Some((variable, path)) = named.or_else(|| in_folder("CUDA_HOME")).or_else(|| in_folder("CUDA_PATH")) {
            return Self::probe(&path).map_err(|why| format!("{variable} leads to {why}; {HOW_TO_INSTALL}"));
        }
        let on_path = env::var_os("PATH")
            .and_then(|path| env::split_paths(&path).map(|folder| folder.join("nvcc")).find(|path| path.is_file()));
        let brought = Some(toolchain_nvcc(toolchain)).filter(|path| path.is_file());
        let mut refused = Vec::new();
        for path in [on_path, brought].into_iter().flatten() {
            match Self::probe(&path) {
                Ok(nvcc) => return Ok(nvcc),
                Err(why) => refused.push(why),
            }
        }
        let found = if refused.is_empty() { "there is no nvcc".to_owned() } else { refused.join(", and ") };
        Err(format!("{found}; {HOW_TO_INSTALL}"))
    }

    /// Runs `nvcc --version`. The error is a phrase: what was found instead.
    fn probe(path: &Path) -> Result<Self, String> {
        let shown = path.display();
        let output = Command::new(path)
            .arg("--version")
            .output()
            .map_err(|error| format!("{shown}, which does not start: {error}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let release = text.split("release ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or_default();
        let mut numbers = release.split('.').map(|number| number.trim().parse::<u32>());
        let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
            return Err(format!("{shown}, which is no nvcc"));
        };
        if (major, minor) < OLDEST_NVCC {
            let (oldest_major, oldest_minor) = OLDEST_NVCC;
            return Err(format!("nvcc {major}.{minor} ({shown}), older than {oldest_major}.{oldest_minor}"));
        }
        Ok(Self { path: path.to_path_buf(), version: (major, minor) })
    }
}

/// Where `cargo xtask toolchain` puts nvcc.
pub(crate) fn toolchain_nvcc(toolchain: &Path) -> PathBuf {
    toolchain.join("nvidia/cu13/bin/nvcc")
}

/// Where `cargo xtask toolchain` puts libclang.
pub(crate) fn toolchain_libclang(toolchain: &Path) -> PathBuf {
    toolchain.join("clang/native/libclang.so")
}
