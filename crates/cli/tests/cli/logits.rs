//! `anabranch logits`: the golden checkpoints' numbers, and inputs that it refuses.

use crate::support::{golden, golden_argument, run};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{collections::BTreeSet, fs, path::Path};
use tempfile::TempDir;

const FAMILIES: [&str; 11] = [
    "deepseek-v1",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3",
    "deepseek-v3-fp8",
    "glm4-moe",
    "llama",
    "mixtral",
    "olmoe",
    "qwen2-moe",
    "qwen3-moe",
];

fn f32s(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::F32, "{name}");
    tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn i64s(file: &SafeTensors<'_>, name: &str) -> Vec<i64> {
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), Dtype::I64, "{name}");
    tensor.data().chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// Writes `input_ids`, or whatever else is named.
fn write_ids(path: &Path, name: &str, shape: &[usize], ids: &[i64]) {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::I64, shape.to_vec(), &bytes).unwrap();
    safetensors::serialize_to_file([(name, tensor)], None, path).unwrap();
}

/// Runs the command on ids in a fresh folder.
struct Case {
    folder: TempDir,
}

impl Case {
    fn new(shape: &[usize], ids: &[i64]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_ids(&folder.path().join("ids"), "input_ids", shape, ids);
        Self { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn run(&self, family: &str, more: &[&str]) -> crate::support::Run {
        let (ids, out, model) = (self.path("ids"), self.path("out"), golden_argument(family));
        let arguments = ["logits", "--model", &model, "--input-ids", &ids, "--out", &out];
        run(&[&arguments, more].concat())
    }

    fn files(&self) -> BTreeSet<String> {
        let names = fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }

    /// Checks that the run is refused and leaves nothing behind.
    #[track_caller]
    fn refused(&self, family: &str, more: &[&str], words: &[&str]) {
        let before = self.files();
        self.run(family, more).failure(1, words);
        assert_eq!(self.files(), before);
    }
}

#[test]
fn every_golden_checkpoint_gives_the_expected_numbers() {
    for family in FAMILIES {
        let expected = fs::read(golden(family).join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&expected).unwrap();
        let case = Case::new(&[2, 24], &i64s(&expected, "input_ids"));
        assert_eq!(case.run(family, &["--hidden"]).success(), "");
        let got = fs::read(case.path("out")).unwrap();
        let got = SafeTensors::deserialize(&got).unwrap();

        let names: BTreeSet<_> =
            expected.names().into_iter().filter(|name| !["input_ids", "greedy"].contains(name)).collect();
        assert_eq!(got.names().into_iter().collect::<BTreeSet<_>>(), names, "{family}");
        for name in names {
            assert_eq!(got.tensor(name).unwrap().shape(), expected.tensor(name).unwrap().shape(), "{family} {name}");
            if name.starts_with("topk") {
                assert_eq!(i64s(&got, name), i64s(&expected, name), "{family} {name}");
                continue;
            }
            for (index, (got, expected)) in f32s(&got, name).iter().zip(f32s(&expected, name)).enumerate() {
                assert!((got - expected).abs() <= 2e-4, "{family} {name}[{index}]: {got}, expected {expected}");
            }
        }
    }
}

#[test]
fn the_likeliest_tokens_are_the_expected_ones() {
    for family in FAMILIES {
        let expected = fs::read(golden(family).join("expected.safetensors")).unwrap();
        let greedy = i64s(&SafeTensors::deserialize(&expected).unwrap(), "greedy");
        let case = Case::new(&[1, greedy.len()], &greedy);
        case.run(family, &[]).success();
        let got = fs::read(case.path("out")).unwrap();
        let got = SafeTensors::deserialize(&got).unwrap();
        assert_eq!(got.names(), ["logits"], "{family}");
        let logits = f32s(&got, "logits");
        let vocab = logits.len() / greedy.len();
        let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i64;
        let chosen: Vec<i64> = logits.chunks(vocab).skip(23).take(16).map(best).collect();
        assert_eq!(chosen, greedy[24..], "{family}");
    }
}

#[test]
fn the_output_replaces_a_file_and_may_be_a_device() {
    let case = Case::new(&[1, 2], &[3, 4]);
    fs::write(case.path("out"), "old").unwrap();
    case.run("llama", &[]).success();
    assert!(SafeTensors::deserialize(&fs::read(case.path("out")).unwrap()).is_ok());
    let (model, ids) = (golden_argument("llama"), case.path("ids"));
    run(&["logits", "--model", &model, "--input-ids", &ids, "--out", "/dev/null"]).success();
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_a_failure() {
    let case = Case::new(&[1, 2], &[3, 4]);
    let (model, ids) = (golden_argument("llama"), case.path("ids"));
    run(&["logits", "--model", &model, "--input-ids", &ids, "--out", "/dev/full"]).failure(1, &["/dev/full", "space"]);
}

#[test]
fn ids_that_make_no_sense() {
    let ids = |shape: &[usize], ids: &[i64], words: &[&str]| Case::new(shape, ids).refused("llama", &[], words);
    ids(&[1, 3], &[1, 2, 512], &["input_ids[0, 2] is 512", "511"]);
    ids(&[2, 2], &[1, 2, -1, 3], &["input_ids[1, 0] is -1"]);
    ids(&[1, 1], &[i64::MAX], &["9223372036854775807"]);
    ids(&[4], &[1, 2, 3, 4], &["shape [4]", "[sequences, tokens]"]);
    ids(&[1, 0], &[], &["no token"]);
    ids(&[0, 5], &[], &["no token"]);
    ids(&[1, 513], &[1; 513], &["513 tokens", "512"]);
}

#[test]
fn files_that_are_no_input() {
    let case = Case::new(&[1, 1], &[1]);
    write_ids(Path::new(&case.path("ids")), "tokens", &[1, 1], &[1]);
    case.refused("llama", &[], &["input_ids"]);
    safetensors::serialize_to_file(
        [("input_ids", TensorView::new(Dtype::F32, vec![1, 1], &[0; 4]).unwrap())],
        None,
        Path::new(&case.path("ids")),
    )
    .unwrap();
    case.refused("llama", &[], &["input_ids", "F32"]);
    fs::write(case.path("ids"), "not safetensors").unwrap();
    case.refused("llama", &[], &["ids"]);
    fs::remove_file(case.path("ids")).unwrap();
    case.refused("llama", &[], &["ids", "no such file"]);
}

#[test]
fn what_this_build_cannot_do() {
    let case = Case::new(&[1, 1], &[1]);
    case.refused("llama", &["--device", "cpu", "--dtype", "bf16"], &["f32", "bf16"]);
    #[cfg(not(feature = "cuda"))]
    case.refused("llama", &["--device", "cuda"], &["no CUDA support", "--device cpu"]);
    #[cfg(feature = "cuda")]
    case.refused("llama", &["--device", "cuda", "--dtype", "f32"], &["bf16 only", "--device cpu"]);
    case.refused("llama", &["--memory-limit", "100K"], &["needs", "available"]);
    case.run("llama", &["--dtype", "f64"]).failure(2, &["f64"]);
    case.run("llama", &["--device", "gpu"]).failure(2, &["gpu", "auto, cpu, cuda"]);
}

#[test]
fn a_folder_that_is_not_there() {
    let case = Case::new(&[1, 1], &[1]);
    let (model, ids, out) = (golden_argument("llama"), case.path("ids"), case.path("no/such/folder/out"));
    run(&["logits", "--model", &model, "--input-ids", &ids, "--out", &out]).failure(1, &["no/such/folder"]);
}
