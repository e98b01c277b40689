//! Checkpoint files: what is read back, and what each kind of damage is called.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use anabranch_model::{
    Checkpoint, Error, Result, TensorFile,
    checkpoint::{Index, TensorLayout, write_tensor_file, write_tensors, write_tensors_to},
};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

/// A file of any header text and any data.
fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

#[track_caller]
fn assert_refused(bytes: &[u8], expected: &str) {
    let error = TensorFile::from_bytes(Path::new("x.safetensors"), bytes.to_vec()).unwrap_err();
    assert!(matches!(error, Error::Checkpoint { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.starts_with("x.safetensors: ") && !text.contains('\n'), "{text}");
    assert!(text.contains(expected), "{text:?} should contain {expected:?}");
}

#[track_caller]
fn assert_open_fails(dir: &Path, expected: &str) {
    let text = Checkpoint::open(dir).unwrap_err().to_string();
    assert!(text.contains(expected), "{text:?} should contain {expected:?}");
}

/// Writes one float32 tensor per name, of the values 0, 1, 2.
fn write_shard(path: &Path, names: &[&str]) {
    let bytes: Vec<u8> = [0f32, 1.0, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    write_tensors(path, names.iter().map(|&name| (name, Dtype::F32, &[3][..], &bytes[..])), &[]).unwrap();
}

fn write_index(dir: &Path, weight_map: &Value) {
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": weight_map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn file_names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn golden_folders_open_and_agree_with_the_safetensors_crate() {
    let mut folders = 0;
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models")).unwrap() {
        let dir = entry.unwrap().path();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let (mut bytes, mut count) = (0, 0);
        for file in file_names(&dir) {
            if !(file.starts_with("model") && file.ends_with("safetensors")) {
                continue;
            }
            let shard = fs::read(dir.join(&file)).unwrap();
            for (name, view) in SafeTensors::deserialize(&shard).unwrap().iter() {
                let tensor = checkpoint.get(name).unwrap();
                assert_eq!((tensor.name(), tensor.path()), (name, dir.join(&file).as_path()));
                assert_eq!((tensor.dtype(), tensor.shape(), tensor.bytes()), (view.dtype(), view.shape(), view.data()));
                assert_eq!(tensor.to_f32().unwrap().len(), view.shape().iter().product::<usize>());
                bytes += view.data().len() as u64;
                count += 1;
            }
        }
        assert_eq!(checkpoint.names().count(), count, "{}", dir.display());
        assert_eq!(checkpoint.total_bytes(), bytes);
        assert!(checkpoint.contains("model.norm.weight") && !checkpoint.contains("model.norm"));
        folders += 1;
    }
    assert!(folders >= 10, "{folders}");
}

#[test]
fn elements_of_every_type_at_any_alignment() {
    // The first tensor has one byte: nothing after it is aligned.
    let header = r#"{"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]},
        "b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},
        "c":{"dtype":"BF16","shape":[],"data_offsets":[9,11]},
        "d":{"dtype":"F16","shape":[1,1],"data_offsets":[11,13]},
        "e":{"dtype":"I64","shape":[1],"data_offsets":[13,21]},
        "f":{"dtype":"I32","shape":[1],"data_offsets":[21,25]},
        "g":{"dtype":"U8","shape":[0,5],"data_offsets":[25,25]},
        "h":{"dtype":"BF16","shape":[0],"data_offsets":[25,25]}}"#;
    let mut data = vec![0x38];
    data.extend(1.5f32.to_le_bytes());
    data.extend((-0.25f32).to_le_bytes());
    data.extend(0x3f80u16.to_le_bytes());
    data.extend(0x3c00u16.to_le_bytes());
    data.extend((-(1i64 << 40)).to_le_bytes());
    data.extend((-7i32).to_le_bytes());
    // Of two neighbouring header lengths at least one puts the float32 at an odd address.
    for padding in ["", " "] {
        let file = TensorFile::from_bytes(Path::new("x"), raw(&format!("{header}{padding}"), &data)).unwrap();
        let floats = |name| file.get(name).unwrap().to_f32();
        let ints = |name| file.get(name).unwrap().to_i64();
        assert_eq!(floats("a").unwrap(), [1.0]);
        assert_eq!(floats("b").unwrap(), [1.5, -0.25]);
        assert_eq!(floats("c").unwrap(), [1.0]);
        assert_eq!(floats("d").unwrap(), [1.0]);
        assert_eq!(ints("e").unwrap(), [-(1 << 40)]);
        assert_eq!(ints("f").unwrap(), [-7]);
        assert_eq!(floats("h").unwrap(), [0f32; 0]);
        assert_eq!(file.get("c").unwrap().shape(), [0usize; 0]);
        assert_eq!(file.names().collect::<Vec<_>>(), ["a", "b", "c", "d", "e", "f", "g", "h"]);
        assert_eq!(file.get("b").unwrap().weight_dtype().unwrap(), anabranch::Dtype::F32);
        let text = floats("g").unwrap_err().to_string();
        assert_eq!(text, "x: tensor g has data type U8, expected F32, F16, BF16 or F8_E4M3");
        let text = ints("a").unwrap_err().to_string();
        assert_eq!(text, "x: tensor a has data type F8_E4M3, expected I64 or I32");
    }
}

#[test]
fn a_wrong_shape_or_name_is_named() {
    let dir = folder();
    let path = dir.path().join("model.safetensors");
    write_shard(&path, &["model.norm.weight"]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let norm = checkpoint.get("model.norm.weight").unwrap();
    norm.expect_shape(&[3]).unwrap();
    for wrong in [&[4][..], &[], &[3, 1]] {
        let text = norm.expect_shape(wrong).unwrap_err().to_string();
        assert!(text.ends_with(&format!("tensor model.norm.weight has shape [3], expected {wrong:?}")), "{text}");
    }
    let text = checkpoint.get("lm_head.weight").unwrap_err().to_string();
    assert!(text.contains("model.safetensors: holds no tensor \"lm_head.weight\""), "{text}");
    let text = TensorFile::open(&path).unwrap().get("input_ids").unwrap_err().to_string();
    assert!(text.contains("holds no tensor \"input_ids\"; it holds \"model.norm.weight\""), "{text}");
}

#[test]
fn damaged_headers_say_what_is_wrong() {
    let one = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    assert_eq!(one.len(), 54);
    assert_refused(&[], "empty file");
    assert_refused(&[1, 2, 3], "only 3 bytes");
    assert_refused(b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file");
    assert_refused(&u64::MAX.to_le_bytes(), "not a safetensors file");
    assert_refused(&raw(one, &[0; 8])[..30], "header should have 54 bytes, but only 22 follow");
    assert_refused(&raw("", &[]), "not valid safetensors JSON");
    assert_refused(&raw("[]", &[]), "expected an object of tensors");
    assert_refused(&raw("{", &[]), "not valid safetensors JSON");
    assert_refused(&raw(&"{\"a\":".repeat(100_000), &[]), "not valid safetensors JSON");
    assert_refused(&[&2u64.to_le_bytes()[..], &[0xff, 0xff]].concat(), "not UTF-8");
    assert_refused(&raw(one, &[0; 5]), "cut short: 3 bytes of 70 are missing");
    assert_refused(&raw(one, &[]), "cut short: 8 bytes of 70 are missing");
    assert_refused(&raw(one, &[0; 9]), "1 bytes follow the last tensor");
    for (entry, expected) in [
        (r#""dtype":"Q4_K","shape":[2],"data_offsets":[0,8]"#, "unknown data type \"Q4_K\""),
        (r#""dtype":"F32","shape":[-2],"data_offsets":[0,8]"#, "invalid value: integer `-2`"),
        (r#""dtype":"F32","shape":["2"],"data_offsets":[0,8]"#, "invalid type: string \"2\""),
        (r#""dtype":"F32","shape":[2.5],"data_offsets":[0,8]"#, "invalid type: floating point"),
        (r#""dtype":"F32","shape":[2]"#, "missing field `data_offsets`"),
        (r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#, "its shape [3] and type F32 need 12 bytes"),
        (r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#, "8 unused bytes"),
        (r#""dtype":"F32","shape":[0],"data_offsets":[0,0]"#, "8 bytes follow"),
        (r#""dtype":"F4","shape":[3],"data_offsets":[0,2]"#, "no whole number of bytes"),
        (r#""dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]"#, "no whole number of bytes"),
        (r#""dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]"#, "no whole number"),
        (r#""dtype":"U8","shape":[2305843009213693951],"data_offsets":[0,2305843009213693951]"#, "are missing"),
    ] {
        assert_refused(&raw(&format!("{{\"a\":{{{entry}}}}}"), &[0; 8]), expected);
    }
    let two = |a: [u64; 2], b: [u64; 2]| {
        let entry = |offsets: [u64; 2]| json!({ "dtype": "U8", "shape": [4], "data_offsets": offsets });
        raw(&json!({ "a": entry(a), "b": entry(b) }).to_string(), &[0; 8])
    };
    assert_refused(&two([0, 4], [2, 6]), "tensor \"b\" at 2..6 overlaps tensor \"a\", which ends at 4");
    assert_refused(&two([4, 8], [0, 8]), "tensor \"b\" lies at 0..8");
    assert_refused(&two([0, 4], [0, 4]), "overlaps");
    assert_refused(&two([4, 8], [3, 7]), "3 unused bytes");
    let twice = format!("{{{0},{0}}}", &one[1..one.len() - 1]);
    assert_refused(&raw(&twice, &[0; 8]), "tensor \"a\" is listed twice");
    TensorFile::from_bytes(Path::new("x"), two([4, 8], [0, 4])).unwrap();
}

#[test]
fn files_that_are_none() {
    let dir = folder();
    assert_open_fails(&dir.path().join("absent"), "no such folder");
    assert_open_fails(dir.path(), "holds neither model.safetensors nor model.safetensors.index.json");
    let path = dir.path().join("model.safetensors");
    fs::write(&path, []).unwrap();
    assert_open_fails(dir.path(), "empty file");
    assert_open_fails(&path, "give the folder that holds it");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert_open_fails(dir.path(), "not a regular file");
    let text = TensorFile::open(&dir.path().join("ids")).unwrap_err().to_string();
    assert!(text.ends_with("ids: no such file"), "{text}");
}

#[test]
fn a_sharded_checkpoint_with_irregular_names() {
    let dir = folder();
    fs::create_dir(dir.path().join("more")).unwrap();
    write_shard(&dir.path().join("weights-b"), &["x.weight", "unlisted"]);
    write_shard(&dir.path().join("more/0.bin"), &["x.weight_scale_inv"]);
    write_index(dir.path(), &json!({ "x.weight": "weights-b", "x.weight_scale_inv": "more/0.bin" }));
    // The index has precedence over a single file that happens to be there.
    write_shard(&dir.path().join("model.safetensors"), &["single"]);

    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["x.weight", "x.weight_scale_inv"]);
    assert_eq!(checkpoint.total_bytes(), 24);
    let scale = checkpoint.get("x.weight_scale_inv").unwrap();
    assert_eq!(scale.path(), dir.path().join("more/0.bin"));
    drop(checkpoint);
    // A tensor keeps its own file mapped.
    assert_eq!(scale.clone().to_f32().unwrap(), [0.0, 1.0, 2.0]);
}

#[test]
fn damaged_shards_are_found_at_open() {
    let dir = folder();
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    write_shard(&dir.path().join(names[0]), &["a"]);
    write_index(dir.path(), &json!({ "a": names[0], "b": names[1] }));
    assert_open_fails(dir.path(), "model-00002-of-00002.safetensors: missing shard");

    let second = dir.path().join(names[1]);
    write_shard(&second, &["c"]);
    assert_open_fails(dir.path(), "model-00002-of-00002.safetensors: lacks tensor \"b\"");

    write_shard(&second, &["b"]);
    Checkpoint::open(dir.path()).unwrap();
    let whole = fs::read(&second).unwrap();
    for len in 0..whole.len() {
        fs::write(&second, &whole[..len]).unwrap();
        let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(text.contains(names[1]), "{len} bytes: {text}");
    }
    fs::write(&second, &whole[..whole.len() - 5]).unwrap();
    assert_open_fails(dir.path(), "cut short: 5 bytes of");
}

#[test]
fn damaged_indexes_say_what_is_wrong() {
    let dir = folder();
    write_shard(&dir.path().join("x"), &["a"]);
    let outside = folder();
    write_shard(&outside.path().join("x"), &["a"]);
    let climbing = format!("../{}/x", outside.path().file_name().unwrap().to_str().unwrap());
    let path = dir.path().join("model.safetensors.index.json");
    let map = |file: &Path| json!({ "weight_map": { "a": file } }).to_string();
    for (text, expected) in [
        ("", "not a valid index"),
        ("[]", "not a valid index"),
        ("{}", "missing field `weight_map`"),
        (r#"{"weight_map": {}}"#, "names no tensor"),
        (r#"{"weight_map": ["a"]}"#, "an object that maps tensor names to file names"),
        (r#"{"weight_map": {"a": 1}}"#, "expected a string"),
        (r#"{"weight_map": {"a": "x", "a": "y"}}"#, "tensor \"a\" is listed twice"),
        (&map(Path::new("")), "must lie in the index's folder"),
        (&map(Path::new(&climbing)), "must lie in the index's folder"),
        (&map(&Path::new("sub/..").join(&climbing)), "must lie in the index's folder"),
        (&map(&outside.path().join("x")), "must lie in the index's folder"),
    ] {
        fs::write(&path, text).unwrap();
        assert_open_fails(dir.path(), expected);
        assert_open_fails(dir.path(), "model.safetensors.index.json: ");
    }
    fs::File::create(&path).unwrap().set_len(100_000_001).unwrap();
    assert_open_fails(dir.path(), "longer than 100000000 bytes");
    fs::write(&path, map(Path::new("x"))).unwrap();
    Checkpoint::open(dir.path()).unwrap();
}

#[test]
fn an_index_is_read_without_files() {
    let index = Index::from_json(Path::new("x"), br#"{"weight_map": {"b": "2", "a": "1"}, "metadata": null}"#).unwrap();
    let pairs: Vec<_> = index.weight_map.iter().map(|(tensor, file)| (tensor.as_str(), file.as_str())).collect();
    assert_eq!(pairs, [("a", "1"), ("b", "2")]);
}

#[test]
fn writing_is_atomic() {
    let dir = folder();
    let path = dir.path().join("out.safetensors");
    write_shard(&path, &["old"]);
    let old = fs::read(&path).unwrap();
    let layout = |name: &'static str| TensorLayout { name: name.into(), dtype: Dtype::U8, shape: vec![4].into() };

    let interrupted = write_tensor_file(&path, &[layout("a"), layout("b")], &[], |index, out| match index {
        0 => out.write(&[0; 4]),
        _ => Err(Error::Interrupted),
    });
    assert!(matches!(interrupted, Err(Error::Interrupted)));
    let few = write_tensor_file(&path, &[layout("a")], &[], |_, out| out.write(&[0; 3]));
    assert!(few.unwrap_err().to_string().ends_with("tensor a was given 3 of its 4 bytes"));
    let many = write_tensor_file(&path, &[layout("a")], &[], |_, out| {
        out.write(&[0; 3])?;
        out.write(&[0; 3])
    });
    assert!(many.unwrap_err().to_string().ends_with("tensor a was given 2 bytes too many"));
    let twice = write_tensor_file(&path, &[layout("a"), layout("a")], &[], |_, out| out.write(&[0; 4]));
    assert!(twice.unwrap_err().to_string().ends_with("two tensors are to be called \"a\""));
    assert_eq!(fs::read(&path).unwrap(), old);

    let text = write_tensors(&dir.path().join("no/such/folder.safetensors"), [], &[]).unwrap_err().to_string();
    assert!(text.starts_with("cannot create"), "{text}");
    fs::create_dir(dir.path().join("folder")).unwrap();
    let text = write_tensors(&dir.path().join("folder"), [], &[]).unwrap_err().to_string();
    assert!(text.starts_with("cannot write"), "{text}");

    write_shard(&path, &["new"]);
    assert_eq!(TensorFile::open(&path).unwrap().names().collect::<Vec<_>>(), ["new"]);
    // No temporary file is left by any of these.
    let mut left = file_names(dir.path());
    left.sort();
    assert_eq!(left, ["folder", "out.safetensors"]);
}

/// A disk with room for so many bytes.
struct Disk(usize);

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let written = bytes.len().min(self.0);
        self.0 -= written;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_is_an_error_wherever_it_happens() {
    let layout = [TensorLayout { name: "a".into(), dtype: Dtype::U8, shape: vec![3 << 20].into() }];
    let write = |room| -> Result<()> {
        write_tensors_to(Disk(room), Path::new("out"), &layout, &[], |_, out| {
            (0..3).try_for_each(|_| out.write(&vec![7; 1 << 20]))
        })
    };
    for room in [0, 10, 100, 1 << 20, 3 << 20] {
        let error = write(room).unwrap_err();
        assert!(matches!(&error, Error::Io { action: "write", .. }), "{error:?}");
        assert!(error.to_string().starts_with("cannot write out: "), "{error}");
    }
    write((3 << 20) + 100).unwrap();
}

#[test]
#[cfg(target_os = "linux")]
fn a_device_is_written_and_not_replaced() {
    use std::os::unix::fs::FileTypeExt;
    let one = [("a", Dtype::U8, &[4][..], &[0; 4][..])];
    let error = write_tensors(Path::new("/dev/full"), one, &[]).unwrap_err();
    assert!(error.to_string().starts_with("cannot write /dev/full: "), "{error}");
    write_tensors(Path::new("/dev/null"), one, &[]).unwrap();
    for device in ["/dev/full", "/dev/null"] {
        assert!(fs::metadata(device).unwrap().file_type().is_char_device());
    }
}

#[test]
#[cfg(unix)]
fn a_link_stays_a_link() {
    let dir = folder();
    let (target, link) = (dir.path().join("target"), dir.path().join("link"));
    fs::write(&target, "old").unwrap();
    std::os::unix::fs::symlink(&target, &link).unwrap();
    write_shard(&link, &["a"]);
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(TensorFile::open(&target).unwrap().names().collect::<Vec<_>>(), ["a"]);
}

fn any_tensor() -> impl Strategy<Value = (Dtype, Vec<usize>)> {
    let dtypes = vec![Dtype::F32, Dtype::BF16, Dtype::F8_E4M3, Dtype::I64];
    (prop::sample::select(dtypes), prop::collection::vec(0usize..4, 0..4))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// What is written is what this crate and the safetensors crate read.
    #[test]
    fn write_then_read(
        layouts in prop::collection::btree_map("[a-z.\"\\\\é]{0,8}", any_tensor(), 0..8),
        seed in any::<u8>(),
    ) {
        let dir = folder();
        let path = dir.path().join("out.safetensors");
        let data: Vec<Vec<u8>> = layouts.values().map(|(dtype, shape)| {
            let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (0..len).map(|place| seed.wrapping_add(place as u8)).collect()
        }).collect();
        let tensors: Vec<_> = layouts.iter().zip(&data)
            .map(|((name, (dtype, shape)), bytes)| (name.as_str(), *dtype, &shape[..], &bytes[..]))
            .collect();
        write_tensors(&path, tensors.iter().copied(), &[("format", "pt")]).unwrap();

        let bytes = fs::read(&path).unwrap();
        prop_assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        prop_assert_eq!(&metadata.metadata().as_ref().unwrap()["format"], "pt");
        let theirs = SafeTensors::deserialize(&bytes).unwrap();
        let ours = TensorFile::open(&path).unwrap();
        prop_assert_eq!(ours.names().count(), tensors.len());
        for (name, dtype, shape, bytes) in tensors {
            let (ours, theirs) = (ours.get(name).unwrap(), theirs.tensor(name).unwrap());
            prop_assert_eq!((ours.dtype(), ours.shape(), ours.bytes()), (dtype, shape, bytes));
            prop_assert_eq!((theirs.dtype(), theirs.shape(), theirs.data()), (dtype, shape, bytes));
        }
    }
}
