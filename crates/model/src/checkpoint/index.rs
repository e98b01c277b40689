//! `model.safetensors.index.json`: which shard holds which tensor.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    path::Path,
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};

use super::shard::problem;
use crate::Result;

/// The index of a sharded checkpoint: `{"metadata": {..}, "weight_map": {tensor: file}}`.
///
/// Only `weight_map` is read: published files disagree about the type and the truth of `metadata.total_size`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// File of each tensor, by tensor name. Every file name is relative and stays inside the folder of the index.
    pub weight_map: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct File {
    weight_map: WeightMap,
}

struct WeightMap(BTreeMap<String, String>);

impl Index {
    /// Reads an index; `path` is what errors call it.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] if the text is no index, names a tensor twice, or names a file outside its folder: an
    /// absolute path, a drive or a `..`. What a symbolic link inside the folder points at is not looked into.
    pub fn from_json(path: &Path, text: &[u8]) -> Result<Self> {
        let file: File = serde_json::from_slice(text)
            .map_err(|error| problem(path, format!("not a valid index of safetensors shards: {error}")))?;
        let WeightMap(weight_map) = file.weight_map;
        if weight_map.is_empty() {
            return Err(problem(path, "its \"weight_map\" names no tensor"));
        }
        for (tensor, name) in &weight_map {
            if !stays_inside(name) {
                return Err(problem(
                    path,
                    format!(
                        "tensor \"{tensor}\" is said to lie in \"{name}\", but a shard must lie in the index's folder"
                    ),
                ));
            }
        }
        Ok(Self { weight_map })
    }
}

/// Whether a file name leads nowhere but into the folder that it is joined to, by the rules of Unix and Windows alike.
fn stays_inside(name: &str) -> bool {
    let absolute = name.starts_with(['/', '\\']);
    // A colon names a drive or a stream on Windows.
    let strange = name.is_empty() || name.contains([':', '\0']);
    !absolute && !strange && name.split(['/', '\\']).all(|part| part != "..")
}

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that maps tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut files = BTreeMap::new();
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    match files.entry(tensor) {
                        Entry::Vacant(place) => _ = place.insert(file),
                        Entry::Occupied(place) => {
                            let twice = format!("tensor \"{}\" is listed twice", place.key());
                            return Err(serde::de::Error::custom(twice));
                        }
                    }
                }
                Ok(WeightMap(files))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::stays_inside;

    #[test]
    fn file_names_stay_inside() {
        for name in ["model.safetensors", "a/b.safetensors", "./x", "..x", "x..", "weights of v3.bin", "ü"] {
            assert!(stays_inside(name), "{name}");
        }
        for name in ["", "/etc/passwd", "..", "../x", "a/../../x", "a\\..\\x", "\\\\host\\x", "C:x", "C:\\x", "a\0b"] {
            assert!(!stays_inside(name), "{name:?}");
        }
    }
}
