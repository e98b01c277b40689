//! The kernels' functions in the object files.
//!
//! The C library (`crates/capi`) has the header's names, and a program may hold both it and this crate. So the launchers
//! are compiled, and bound, under names of their own: `anabranch_router` is `anabranch_kernels_router` to the linker.

use std::{collections::BTreeSet, fs, path::Path};

const PREFIX: &str = "anabranch_";

/// The name of a function of the header in the object files.
pub(crate) fn linked(function: &str) -> Option<String> {
    function.strip_prefix(PREFIX).map(|rest| format!("{PREFIX}kernels_{rest}"))
}

/// nvcc's arguments that give every function of the header its name.
pub(crate) fn defines(header: &Path) -> Result<Vec<String>, String> {
    let text = fs::read_to_string(header).map_err(|error| format!("cannot read {}: {error}", header.display()))?;
    let names = functions(&text).into_iter();
    Ok(names.filter_map(|name| linked(name).map(|to| format!("-D{name}={to}"))).collect())
}

/// What is called or declared: a name, then a parenthesis.
fn functions(header: &str) -> BTreeSet<&str> {
    let named = |start: usize| {
        let rest = &header[start..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
        rest[end..].starts_with('(').then_some(&rest[..end])
    };
    header.match_indices(PREFIX).filter_map(|(start, _)| named(start)).collect()
}
