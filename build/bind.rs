//! Rust bindings of the C header.
//!
//! bindgen and the libclang loader report trouble by panicking and take libclang's folder from the environment only, which
//! a program cannot change safely for itself. So the bindings are made by this very program, run again with a variable
//! that says so: whatever happens there comes back as an exit status and text.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use bindgen::callbacks::{ItemInfo, ParseCallbacks};

use crate::{
    locate::{HOW_TO_INSTALL, toolchain_libclang},
    names,
};

/// Set to the header's path for the run that makes the bindings, whose text goes to [`OUTPUT`].
pub(crate) const CHILD: &str = "ANABRANCH_BIND_HEADER";
const OUTPUT: &str = "ANABRANCH_BIND_OUTPUT";

/// Writes `bindings.rs` into `out`, if it changed.
pub(crate) fn bind(toolchain: &Path, out: &Path) -> Result<(), String> {
    let fresh = out.join("bindings.new.rs");
    let program = env::current_exe().map_err(|error| format!("cannot find this program again: {error}"))?;
    let mut command = Command::new(program);
    command.env(CHILD, header()).env(OUTPUT, &fresh);
    let brought = toolchain_libclang(toolchain);
    if env::var_os("LIBCLANG_PATH").is_none_or(|path| path.is_empty()) && brought.is_file() {
        command.env("LIBCLANG_PATH", &brought);
    }
    let output = command.output().map_err(|error| format!("cannot make the bindings: {error}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        if text.contains("libclang") {
            let first = text.lines().find(|line| line.contains("libclang")).unwrap_or_default().trim();
            return Err(format!("libclang cannot be used ({first}); {HOW_TO_INSTALL}"));
        }
        return Err(format!("{} cannot be bound: {}", header().display(), text.trim()));
    }
    // An unchanged file keeps its time, and the crate is not compiled again for it.
    let read = |path: &Path| fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()));
    let (bindings, text) = (out.join("bindings.rs"), read(&fresh)?);
    if fs::read(&bindings).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(&bindings, text).map_err(|error| format!("cannot write {}: {error}", bindings.display()))
}

/// The second run: makes the bindings.
pub(crate) fn child(header: &Path) -> Result<(), String> {
    let output = env::var_os(OUTPUT).map(PathBuf::from).ok_or(format!("{OUTPUT} is not set"))?;
    bindgen::Builder::default()
        .header(header.to_string_lossy())
        .allowlist_item("[Aa][Nn][Aa][Bb][Rr][Aa][Nn][Cc][Hh].*")
        // A C enum may hold any value: a newtype says so, a Rust enum would be undefined behaviour.
        .default_enum_style(bindgen::EnumVariation::NewType { is_bitfield: false, is_global: false })
        .prepend_enum_name(false)
        .merge_extern_blocks(true)
        .generate_comments(true)
        .parse_callbacks(Box::new(LinkNames))
        .layout_tests(false)
        .formatter(bindgen::Formatter::None)
        .generate()
        .map_err(|error| error.to_string())?
        .write_to_file(&output)
        .map_err(|error| format!("cannot write {}: {error}", output.display()))
}

/// Binds each function to its name in the object files.
#[derive(Debug)]
struct LinkNames;

impl ParseCallbacks for LinkNames {
    fn generated_link_name_override(&self, item: ItemInfo<'_>) -> Option<String> {
        names::linked(item.name)
    }
}

fn header() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/include/anabranch.h")
}
