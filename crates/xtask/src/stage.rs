//! `cargo xtask stage [DIR]`: GPU tests, benches and the command-line tool with kernels, the embeddings in C, Python and
//! candle, and the data they need, in a folder that runs on a GPU host which has neither Rust nor nvcc nor the sources.

use crate::{
    Failure, candle, capi, golden,
    process::{cargo, root, run as run_process, target},
    toolchain,
};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The folder's size limit: it travels to other machines.
const MOST_BYTES: u64 = 30 << 20;

/// Programs to gather, as (cargo's arguments, target's kind and name in cargo's messages, name in the folder).
const PROGRAMS: &[(&[&str], &str, &str, &str)] = &[
    (&["test", "--no-run", "--package", "anabranch", "--test", "gpu"], "test", "gpu", "gpu-tests"),
    (&["test", "--no-run", "--package", "anabranch-model", "--test", "gpu"], "test", "gpu", "model-tests"),
    (&["bench", "--no-run", "--package", "anabranch", "--bench", "gpu"], "bench", "gpu", "gpu-benches"),
    (&["build", "--package", "anabranch-cli"], "bin", "anabranch", "anabranch"),
    (&["build", "--package", "anabranch", "--example", "embed_stream"], "example", "embed_stream", "embed_stream"),
];

/// What holds the programs and the C library until they are packed, and in the archive.
const PACKED: &str = "programs";

/// Golden layers go along without their gradients.
const LAYERS: (&str, &str) = ("tests/golden/layers", "golden/layers");
/// So do the golden checkpoints.
const CHECKPOINTS: (&str, &str) = ("tests/golden/models", "golden/models");

const RUN: &str = include_str!("run.sh");

/// The command.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let folder = match arguments {
        [] => target().join("stage"),
        [folder] => std::env::current_dir().unwrap_or_else(|_| root()).join(folder),
        _ => return Err(Failure::Usage("`stage` takes one folder at most".to_owned())),
    };
    toolchain::ensure()?;
    prepare(&folder)?;
    for (arguments, kind, name, staged) in PROGRAMS {
        // `bench` is a release build already, and knows no such flag.
        let release: &[&str] = if arguments[0] == "bench" { &[] } else { &["--release"] };
        let mut command = cargo([]);
        let program = build(command.args(*arguments).args(release).args(["--features", "cuda"]), kind, name)?;
        copy(&program, &folder.join(PACKED).join(staged))?;
    }
    copy_layers(&root().join(LAYERS.0), &folder.join(LAYERS.1))?;
    copy(&root().join(CHECKPOINTS.0), &folder.join(CHECKPOINTS.1))?;
    pack(&folder, "golden")?;
    embedding(&folder)?;
    pack(&folder, PACKED)?;
    candle::stage(&folder)?;
    let script = folder.join("run.sh");
    fs::write(&script, RUN).map_err(|error| cannot("write", &script, &error))?;
    executable(&script)?;

    let bytes = size(&folder).map_err(|error| cannot("measure", &folder, &error))?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("{}: {:.1} MiB; on the GPU host: {0}/run.sh all", folder.display(), mib(bytes));
    if bytes > MOST_BYTES {
        return Err(Failure::Failed(format!("the folder has {:.1} MiB, more than {:.0}", mib(bytes), mib(MOST_BYTES))));
    }
    Ok(())
}

/// The C library, the programs that test it, and the Python package with its tests.
fn embedding(folder: &Path) -> Result<(), Failure> {
    let prefix = target().join("capi");
    capi::install(&prefix)?;
    copy(&prefix.join("lib").join(capi::SHARED), &folder.join(PACKED).join("lib").join(capi::SHARED))?;
    copy(&prefix.join("include"), &folder.join("include"))?;
    capi::compile(&prefix, &folder.join(PACKED).join("capi"), false)?;
    for (from, to) in [("src/anabranch", "anabranch"), ("tests", "tests"), ("bench_experts.py", "bench_experts.py")] {
        copy(&root().join("python").join(from), &folder.join("python").join(to))?;
    }
    Ok(())
}

/// An empty folder. One that holds anything but an earlier stage is left alone.
fn prepare(folder: &Path) -> Result<(), Failure> {
    let occupied = fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
    if occupied && !folder.join("run.sh").is_file() {
        return Err(Failure::Failed(format!("{} is not empty and was not made by `stage`", folder.display())));
    }
    if occupied {
        fs::remove_dir_all(folder).map_err(|error| cannot("empty", folder, &error))?;
    }
    fs::create_dir_all(folder).map_err(|error| cannot("make", folder, &error))
}

/// Runs a command of cargo and returns where the program is that it built, from cargo's messages.
pub(crate) fn build(command: &mut Command, kind: &str, name: &str) -> Result<PathBuf, Failure> {
    let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy().into_owned()).collect();
    let arguments = arguments.join(" ");
    eprintln!("$ cargo {arguments}");
    let output = command
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .map_err(|error| Failure::Failed(format!("cannot start cargo: {error}")))?;
    if !output.status.success() {
        return Err(Failure::Failed(format!("`cargo {arguments}` ended with {}", output.status)));
    }
    let messages = String::from_utf8_lossy(&output.stdout);
    executable_of(&messages, kind, name)
        .ok_or_else(|| Failure::Failed(format!("cargo built no {kind} named {name}, or its messages have changed")))
}

/// The path in the message of a target. cargo writes one JSON object a line, without spaces; a full reader is not needed for
/// two fixed fields and a path.
fn executable_of(messages: &str, kind: &str, name: &str) -> Option<PathBuf> {
    let target = format!("\"kind\":[\"{kind}\"],");
    let named = format!("\"name\":\"{name}\",");
    messages.lines().filter(|line| line.contains(&target) && line.contains(&named)).find_map(|line| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        let (path, _) = rest.split_once('"')?;
        Some(PathBuf::from(path.replace("\\\\", "\\")))
    })
}

/// Packs a folder of the stage. The dictionary spans all of it, since programs differ in little: each carries every kernel.
pub(crate) fn pack(folder: &Path, name: &str) -> Result<(), Failure> {
    let mut tar = Command::new("tar");
    tar.args(["--use-compress-program", "xz -T1 --lzma2=preset=3,dict=192MiB", "-C"]).arg(folder);
    run_process(tar.arg("-cf").arg(folder.join(format!("{name}.tar.xz"))).arg(name))?;
    let packed = folder.join(name);
    fs::remove_dir_all(&packed).map_err(|error| cannot("remove", &packed, &error))
}

/// Copies a file, or a folder with all it holds.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    if !from.is_dir() {
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).map_err(|error| cannot("make", folder, &error))?;
        }
        return fs::copy(from, to).map(drop).map_err(|error| cannot("copy", from, &error));
    }
    for entry in fs::read_dir(from).map_err(|error| cannot("read", from, &error))? {
        let entry = entry.map_err(|error| cannot("read", from, &error))?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Copies golden layers, without what only training reads.
fn copy_layers(from: &Path, to: &Path) -> Result<(), Failure> {
    fs::create_dir_all(to).map_err(|error| cannot("make", to, &error))?;
    for entry in fs::read_dir(from).map_err(|error| cannot("read", from, &error))? {
        let path = entry.map_err(|error| cannot("read", from, &error))?.path();
        let bytes = fs::read(&path).map_err(|error| cannot("read", &path, &error))?;
        let forward = golden::forward_only(&bytes)
            .ok_or_else(|| Failure::Failed(format!("{} is no golden layer that can be shortened", path.display())))?;
        let copy = to.join(path.file_name().unwrap_or_default());
        fs::write(&copy, forward).map_err(|error| cannot("write", &copy, &error))?;
    }
    Ok(())
}

fn size(path: &Path) -> io::Result<u64> {
    if !path.is_dir() {
        return Ok(fs::metadata(path)?.len());
    }
    fs::read_dir(path)?.map(|entry| size(&entry?.path())).sum()
}

#[cfg(unix)]
fn executable(script: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(script, fs::Permissions::from_mode(0o755)).map_err(|error| cannot("mark", script, &error))
}

#[cfg(not(unix))]
fn executable(_: &Path) -> Result<(), Failure> {
    Ok(())
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::Failed(format!("cannot {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::executable_of;
    use std::path::PathBuf;

    #[test]
    fn the_executable_is_found_among_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"gpu","x":1},"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"gpu","x":1},"executable":"/a/gpu-1"}"#,
        );
        assert_eq!(executable_of(messages, "test", "gpu"), Some(PathBuf::from("/a/gpu-1")));
        assert_eq!(executable_of(messages, "bench", "gpu"), None);
    }
}
