//! Compiles every kernel file, as many at once as cargo allows, and only those that changed.

use std::{
    collections::hash_map::DefaultHasher,
    env, fs,
    hash::{Hash, Hasher},
    num::NonZero,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use crate::{locate::Nvcc, names, targets::Targets};

/// Compiles `kernels/**/*.cu` into `libanabranch_kernels.a` in `out` and tells cargo to link it.
///
/// Objects are kept in `cache`, which all profiles share: kernels are always optimised, so the tests, the linter and a
/// release build compile each one once between them.
pub(crate) fn compile(nvcc: &Nvcc, targets: &Targets, cache: &Path, out: &Path) -> Result<(), String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::create_dir_all(cache).map_err(|error| format!("cannot make {}: {error}", cache.display()))?;
    let mut sources = Vec::new();
    collect(&root.join("kernels"), &mut sources)?;
    sources.sort();
    let renamed = names::defines(&root.join("kernels/include/anabranch.h"))?;
    let units = sources
        .iter()
        .map(|source| Unit::new(nvcc, targets, root, source, &renamed, cache, out))
        .collect::<Result<Vec<_>, String>>()?;

    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok());
    let jobs =
        jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, NonZero::get)).clamp(1, units.len().max(1));
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(unit) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(message) = unit.ensure()
                        && let Ok(mut failures) = failures.lock()
                    {
                        failures.push(message);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().map_err(|_| "a compiling thread stopped unexpectedly")?;
    if !failures.is_empty() {
        return Err(failures.join("\n"));
    }
    resource_log(&units, out)?;
    archive(&units, out)?;
    link(nvcc, out)
}

/// One kernel file.
struct Unit {
    /// Path below the repository's root, for messages.
    name: String,
    command: Mutex<Command>,
    /// What decides the object besides the files' contents: compiler and arguments.
    fingerprint: u64,
    object: PathBuf,
}

impl Unit {
    fn new(
        nvcc: &Nvcc,
        targets: &Targets,
        root: &Path,
        source: &Path,
        renamed: &[String],
        cache: &Path,
        out: &Path,
    ) -> Result<Self, String> {
        let name = source.strip_prefix(root).unwrap_or(source).display().to_string();
        let file_name = source.file_name().unwrap_or_default().to_string_lossy();
        let mut build = cc::Build::new();
        // cc reads nvcc's path from the environment, which a program cannot change safely for itself.
        build
            .cuda(true)
            .set_envs_snapshot(env::vars_os().chain([("NVCC".into(), nvcc.path.clone().into())]))
            .cargo_metadata(false)
            .out_dir(out)
            .opt_level(3)
            .debug(false)
            .warnings(false)
            .std("c++17")
            .include(root.join("kernels"))
            .include(root.join("kernels/include"));
        // Nothing may need a C++ runtime: no exceptions, no type information, no locks around local statics. The only ones of
        // those are in nvcc's stubs for <<<>>>, which launchers do not use.
        // Machine code is compressed to a quarter: every binary carries all of it.
        let host = "-Xcompiler=-fno-exceptions,-fno-rtti,-fno-threadsafe-statics,-Wall,-Wextra";
        for flag in [host, "-Werror=all-warnings", "-Xptxas=-v", "--compress-mode=size"] {
            build.flag(flag);
        }
        build.flags(targets.gencode(&file_name));
        build.flags(renamed);
        let compiler = build.try_get_compiler().map_err(|error| format!("{name}: {error}"))?;
        let mut command = compiler.to_command();
        command.arg("-c").arg(source);

        let mut hasher = DefaultHasher::new();
        (nvcc.version, &nvcc.path, root).hash(&mut hasher);
        command.get_args().for_each(|argument| argument.hash(&mut hasher));
        let fingerprint = hasher.finish();
        let flat = name.replace(['/', '\\'], "-");
        let object = cache.join(format!("{flat}-{fingerprint:016x}.o"));
        Ok(Self { name, command: Mutex::new(command), fingerprint, object })
    }

    /// Compiles the file unless its object was made from the same compiler, arguments, source and headers.
    fn ensure(&self) -> Result<(), String> {
        let stamp = self.object.with_extension("stamp");
        let current = self.state(&self.object.with_extension("d"));
        if self.object.is_file() && current.is_some() && fs::read_to_string(&stamp).ok() == current {
            return Ok(());
        }
        // Two builds may run at once: each writes files of its own and renames them.
        let own = format!("{}.tmp", std::process::id());
        let (object, depends) =
            (self.object.with_extension(format!("o.{own}")), self.object.with_extension(format!("d.{own}")));
        let output = {
            let mut command = self.command.lock().map_err(|_| format!("{}: a compiling thread stopped", self.name))?;
            command.arg("-o").arg(&object).arg("-MD").arg("-MF").arg(&depends);
            command.output().map_err(|error| format!("{}: cannot start nvcc: {error}", self.name))?
        };
        let log = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            let _ = (fs::remove_file(&object), fs::remove_file(&depends));
            return Err(format!("{} does not compile:\n{}", self.name, log.trim()));
        }
        let io = |error: std::io::Error| format!("{}: cannot keep its object: {error}", self.name);
        let state = self.state(&depends).ok_or(format!("{}: nvcc wrote no list of headers", self.name))?;
        fs::write(self.object.with_extension("log"), log).map_err(io)?;
        fs::rename(&depends, self.object.with_extension("d")).map_err(io)?;
        fs::rename(&object, &self.object).map_err(io)?;
        fs::write(stamp, state).map_err(io)
    }

    /// A hash of everything that the object is made from, the files as listed in a make rule; `None` if one cannot be read.
    /// The toolkit's own headers are left to the compiler's version.
    fn state(&self, depends: &Path) -> Option<String> {
        let mut hasher = DefaultHasher::new();
        self.fingerprint.hash(&mut hasher);
        let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let rule = fs::read_to_string(depends).ok()?.replace("\\\n", " ").replace("\\ ", "\u{0}");
        let (_, files) = rule.split_once(": ")?;
        for file in files.split_whitespace().map(|file| PathBuf::from(file.replace('\u{0}', " "))) {
            if file.starts_with(&kernels) {
                (&file, fs::read(&file).ok()?).hash(&mut hasher);
            }
        }
        Some(format!("{:016x}", hasher.finish()))
    }
}

fn collect(folder: &Path, sources: &mut Vec<PathBuf>) -> Result<(), String> {
    let cannot = |error: std::io::Error| format!("cannot read {}: {error}", folder.display());
    for entry in fs::read_dir(folder).map_err(cannot)? {
        let path = entry.map_err(cannot)?.path();
        if path.is_dir() {
            collect(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    Ok(())
}

/// Gathers what the assembler said of registers, shared memory and spills, for reading: `kernels.log` beside the archive.
fn resource_log(units: &[Unit], out: &Path) -> Result<(), String> {
    let mut text = String::new();
    for unit in units {
        let log = fs::read_to_string(unit.object.with_extension("log")).unwrap_or_default();
        text.extend(["== ", &unit.name, "\n", &log]);
    }
    let path = out.join("kernels.log");
    fs::write(&path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))
}

/// Makes the static library. No device link: every kernel file is a whole program of its own.
fn archive(units: &[Unit], out: &Path) -> Result<(), String> {
    let library = out.join("libanabranch_kernels.a");
    let _ = fs::remove_file(&library);
    cc::Build::new()
        .cargo_metadata(false)
        .out_dir(out)
        .try_create_archive("anabranch_kernels", units.iter().map(|unit| &unit.object))
        .map(drop)
        .map_err(|error| format!("cannot make {}: {error}", library.display()))
}

/// The library, and the CUDA runtime's static one beside the compiler, with what that needs from the system.
fn link(nvcc: &Nvcc, out: &Path) -> Result<(), String> {
    let real = fs::canonicalize(&nvcc.path).unwrap_or_else(|_| nvcc.path.clone());
    let toolkit = real.ancestors().nth(2).unwrap_or(Path::new("/"));
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let targets =
        if arch == "aarch64" { "targets/sbsa-linux/lib".to_owned() } else { format!("targets/{arch}-linux/lib") };
    let places = [toolkit.join("lib64"), toolkit.join(targets), toolkit.join("lib")];
    let Some(cudart) = places.iter().find(|folder| folder.join("libcudart_static.a").is_file()) else {
        return Err(format!(
            "there is no libcudart_static.a in {}: install the CUDA runtime beside nvcc",
            toolkit.display()
        ));
    };
    println!("cargo::rustc-link-search=native={}", out.display());
    println!("cargo::rustc-link-search=native={}", cudart.display());
    println!("cargo::rustc-link-lib=static=anabranch_kernels");
    println!("cargo::rustc-link-lib=static=cudart_static");
    for system in ["dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib={system}");
    }
    Ok(())
}
