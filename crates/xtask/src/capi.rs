//! `cargo xtask capi [DIR]`: builds the C library and lays it out as an installation; and the gate's step that checks it.

use crate::{
    Failure,
    process::{cargo, root, run as run_process, target, toolchain as toolchain_folder},
    test::{Outcome, has_gpu},
    toolchain,
};
use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const HEADER: &str = "kernels/include/anabranch.h";
/// What programs load: the number is the ABI's.
pub(crate) const SHARED: &str = "libanabranch.so.1";
const SHARED_LINK: &str = "libanabranch.so";
const STATIC: &str = "libanabranch.a";

/// C programs that use the library: an example and a test, by source and name.
const PROGRAMS: &[(&str, &str)] =
    &[("crates/capi/examples/moe_layer.c", "moe_layer"), ("crates/capi/tests/contracts.c", "contracts")];

/// The command.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let prefix = match arguments {
        [] => target().join("capi"),
        [folder] => env::current_dir().unwrap_or_else(|_| root()).join(folder),
        _ => return Err(Failure::Usage("`capi` takes one folder at most".to_owned())),
    };
    install(&prefix)?;
    println!("{0}: include/anabranch.h, lib/{SHARED}, lib/{STATIC}, lib/pkgconfig/anabranch.pc", prefix.display());
    println!("PKG_CONFIG_PATH={}/lib/pkgconfig pkg-config --cflags --libs anabranch", prefix.display());
    Ok(())
}

/// Header, libraries and pkg-config file below a prefix. What else is there stays.
pub(crate) fn install(prefix: &Path) -> Result<(), Failure> {
    toolchain::ensure()?;
    let (include, lib) = (prefix.join("include"), prefix.join("lib"));
    for folder in [&include, &lib.join("pkgconfig")] {
        fs::create_dir_all(folder).map_err(|error| cannot("make", folder, &error))?;
    }
    let messages = build()?;
    let copy = |from: &Path, to: &Path| {
        // A library that a program has mapped is replaced, not written over.
        let _ = fs::remove_file(to);
        fs::copy(from, to).map(drop).map_err(|error| cannot("copy", from, &error))
    };
    copy(&root().join(HEADER), &include.join("anabranch.h"))?;
    copy(&built(&messages, SHARED_LINK)?, &lib.join(SHARED))?;
    copy(&built(&messages, STATIC)?, &lib.join(STATIC))?;
    link(SHARED, &lib.join(SHARED_LINK))?;
    let template = root().join("crates/capi/anabranch.pc.in");
    let text = fs::read_to_string(&template).map_err(|error| cannot("read", &template, &error))?;
    let file = lib.join("pkgconfig/anabranch.pc");
    let text = text.replace("@VERSION@", env!("CARGO_PKG_VERSION"));
    fs::write(&file, text).map_err(|error| cannot("write", &file, &error))
}

fn build() -> Result<String, Failure> {
    let arguments = ["build", "--release", "--package", "anabranch-capi", "--features", "cuda"];
    eprintln!("$ cargo {}", arguments.join(" "));
    let output =
        cargo(arguments).args(["--message-format", "json-render-diagnostics"]).stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| Failure::Failed(format!("cannot start cargo: {error}")))?;
    if !output.status.success() {
        return Err(Failure::Failed(format!("`cargo {}` ended with {}", arguments.join(" "), output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where a library was put, from cargo's messages.
fn built(messages: &str, file: &str) -> Result<PathBuf, Failure> {
    let ending = format!("/{file}");
    let path = messages.split('"').find(|word| word.ends_with(&ending)).map(PathBuf::from);
    path.ok_or_else(|| Failure::Failed(format!("cargo built no {file}, or its messages have changed")))
}

#[cfg(unix)]
fn link(to: &str, at: &Path) -> Result<(), Failure> {
    let _ = fs::remove_file(at);
    std::os::unix::fs::symlink(to, at).map_err(|error| cannot("link", at, &error))
}

#[cfg(not(unix))]
fn link(to: &str, at: &Path) -> Result<(), Failure> {
    fs::copy(at.with_file_name(to), at).map(drop).map_err(|error| cannot("copy", at, &error))
}

/// The gate's step: the library exports what the header declares and nothing else, needs no CUDA library when it is
/// loaded, and C programs build with it, shared and static, and run: the test everywhere, the example where there is a
/// GPU.
pub(crate) fn check() -> Result<Outcome, Failure> {
    let prefix = target().join("capi");
    install(&prefix)?;
    let shared = prefix.join("lib").join(SHARED);
    check_symbols(&shared)?;
    let needed = output(Command::new("readelf").arg("-d").arg(&shared))?;
    if let Some(line) = needed.lines().find(|line| line.contains("(NEEDED)") && line.contains("cuda")) {
        return Err(Failure::Failed(format!("{} needs a CUDA library: {}", shared.display(), line.trim())));
    }
    let programs = prefix.join("check");
    compile(&prefix, &programs, false)?;
    let run = |program: &Path| {
        let mut command = Command::new(program);
        if has_gpu() {
            command.env("ANABRANCH_REQUIRE_GPU", "1");
        }
        run_process(&mut command)
    };
    run(&programs.join("contracts"))?;
    if has_gpu() {
        run(&programs.join("moe_layer"))?;
    }
    let with_static = prefix.join("check-static");
    compile(&prefix, &with_static, true)?;
    run(&with_static.join("contracts"))?;
    Ok(Outcome::Passed)
}

fn check_symbols(library: &Path) -> Result<(), Failure> {
    let listed = output(Command::new("nm").args(["-D", "--defined-only"]).arg(library))?;
    let exported: BTreeSet<_> = listed.lines().filter_map(|line| line.split_whitespace().last()).collect();
    let header = root().join(HEADER);
    let text = fs::read_to_string(&header).map_err(|error| cannot("read", &header, &error))?;
    let declared = declared(&text);
    if exported == declared {
        return Ok(());
    }
    let names = |set: BTreeSet<&str>| set.into_iter().collect::<Vec<_>>().join(", ");
    Err(Failure::Failed(format!(
        "{} exports what {HEADER} does not declare: [{}]; and lacks: [{}]",
        library.display(),
        names(&exported - &declared),
        names(&declared - &exported)
    )))
}

/// The functions of a header: words with our prefix before a parenthesis, outside of comments.
fn declared(header: &str) -> BTreeSet<&str> {
    let code = header.lines().map(|line| line.split("//").next().unwrap_or_default());
    code.flat_map(|line| line.split('(').rev().skip(1))
        .filter_map(|before| before.rsplit(|c: char| !c.is_ascii_alphanumeric() && c != '_').next())
        .filter(|word| word.starts_with("anabranch_"))
        .collect()
}

/// Builds the C programs into a folder, against the library of a prefix. Programs beside `lib` find the shared one there.
pub(crate) fn compile(prefix: &Path, into: &Path, statically: bool) -> Result<(), Failure> {
    fs::create_dir_all(into).map_err(|error| cannot("make", into, &error))?;
    let lib = prefix.join("lib");
    let nvcc = toolchain::Nvcc::find(&toolchain_folder()).map_err(Failure::Failed)?;
    let nvcc = fs::canonicalize(&nvcc.path).unwrap_or(nvcc.path);
    let toolkit = nvcc.ancestors().nth(2).unwrap_or(Path::new("/"));
    for (source, name) in PROGRAMS {
        let mut gcc = Command::new("gcc");
        gcc.current_dir(root())
            .args(["-std=c11", "-O2", "-s", "-Wall", "-Wextra", "-Werror", source, "-o"])
            .arg(into.join(name));
        if statically {
            gcc.arg("-I").arg(prefix.join("include")).arg(lib.join(STATIC)).arg("-lgcc_s");
        } else {
            gcc.args(flags(prefix)?).arg("-Wl,-rpath,$ORIGIN/../lib");
        }
        // The program's own runtime, for cudaMalloc and the like: static too, so that it starts without a GPU.
        gcc.arg("-I").arg(toolkit.join("include"));
        for folder in ["lib64", "lib"] {
            gcc.arg("-L").arg(toolkit.join(folder));
        }
        run_process(gcc.args(["-lcudart_static", "-lpthread", "-lrt", "-ldl", "-lm"]))?;
    }
    Ok(())
}

/// What a C compiler is told: by pkg-config, or, where there is none, what that would say.
fn flags(prefix: &Path) -> Result<Vec<String>, Failure> {
    let mut command = Command::new("pkg-config");
    command.args(["--cflags", "--libs", "anabranch"]).env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"));
    if command.stderr(Stdio::null()).output().is_err() {
        let folder = |flag: &str, name: &str| format!("{flag}{}", prefix.join(name).display());
        return Ok(vec![folder("-I", "include"), folder("-L", "lib"), "-lanabranch".to_owned()]);
    }
    Ok(output(&mut command)?.split_whitespace().map(str::to_owned).collect())
}

fn output(command: &mut Command) -> Result<String, Failure> {
    let name = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(Failure::Failed(format!("`{name}` ended with {}", output.status))),
        Err(error) => Err(Failure::Failed(format!("cannot start `{name}`: {error}"))),
    }
}

fn cannot(what: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::Failed(format!("cannot {what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::declared;

    #[test]
    fn functions_are_found_in_a_header() {
        let header = "// anabranch_not(me)\nint32_t anabranch_one(void);\nconst char* anabranch_two(\n  int x);\n\
                      typedef struct S { int anabranch_field; } S;\n";
        assert_eq!(declared(header).into_iter().collect::<Vec<_>>(), ["anabranch_one", "anabranch_two"]);
    }
}
