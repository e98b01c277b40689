//! `anabranch route`: what it counts is what the routers chose, and runs that it refuses.

use crate::support::{Copy, Run, golden, golden_argument, run, run_with_input};
use anabranch_model::Tokenizer;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};
use tempfile::TempDir;

const PROMPT: &str = "A mixture of experts sends every token to a few of its experts, and no token to all of them.";

/// A folder for what a run writes.
struct Case {
    folder: TempDir,
}

impl Case {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn run(&self, model: &str, more: &[&str]) -> Run {
        let json = self.path("usage.json");
        run(&[&["route", "--model", model, "--json", &json], more].concat())
    }

    /// What a run counts.
    fn counted(&self, model: &str, more: &[&str]) -> Value {
        self.run(model, more).success();
        serde_json::from_slice(&fs::read(self.path("usage.json")).unwrap()).unwrap()
    }

    fn files(&self) -> BTreeSet<String> {
        let names = fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }

    /// Checks that the run is refused and writes nothing, not even to a file that is there.
    #[track_caller]
    fn refused(&self, model: &str, more: &[&str], code: i32, words: &[&str]) {
        fs::write(self.path("usage.json"), "old").unwrap();
        let before = self.files();
        self.run(model, more).failure(code, words);
        assert_eq!(self.files(), before);
        assert_eq!(fs::read_to_string(self.path("usage.json")).unwrap(), "old");
    }
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
}

/// Each MoE layer's number and the ids `[T, K]` that `logits --hidden` has for these tokens in one pass.
fn chosen(model: &str, ids: &[u32]) -> Vec<(u64, Vec<usize>)> {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::I64, vec![1, ids.len()], &bytes).unwrap();
    safetensors::serialize_to_file([("input_ids", tensor)], None, Path::new(&path("ids"))).unwrap();
    run(&["logits", "--model", model, "--input-ids", &path("ids"), "--out", &path("out"), "--hidden"]).success();
    let out = fs::read(path("out")).unwrap();
    let out = SafeTensors::deserialize(&out).unwrap();
    let layer = |name: &str| name.strip_prefix("topk.").map(|layer| layer.parse().unwrap());
    let ids = |name: &str| {
        let bytes = out.tensor(name).unwrap().data().chunks_exact(8);
        bytes.map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as usize).collect()
    };
    let mut layers: Vec<(u64, Vec<usize>)> =
        out.names().into_iter().filter_map(|name| Some((layer(name)?, ids(name)))).collect();
    layers.sort();
    layers
}

#[test]
fn counts_are_those_of_the_choices() {
    for family in ["deepseek-v1", "deepseek-v3", "mixtral", "qwen3-moe"] {
        let model = golden_argument(family);
        let ids = Tokenizer::from_dir(&golden(family)).unwrap().encode(PROMPT).unwrap();
        let usage = Case::new().counted(&model, &["--prompt", PROMPT]);
        assert_eq!((usage["model"].as_str(), usage["text"].as_str()), (Some(family), Some("one prompt")));
        assert_eq!((usage["tokens"].as_u64(), usage["sequences"].as_u64()), (Some(ids.len() as u64), Some(1)));
        let (experts, topk) =
            (usage["num_experts"].as_u64().unwrap() as usize, usage["topk"].as_u64().unwrap() as usize);
        let layers = usage["layers"].as_array().unwrap();
        let expected = chosen(&model, &ids);
        assert_eq!(layers.len(), expected.len(), "{family}");
        for (layer, (index, ids)) in layers.iter().zip(expected) {
            assert_eq!(layer["layer"], index);
            let with =
                |a: usize, b: usize| ids.chunks(topk).filter(|ids| ids.contains(&a) && ids.contains(&b)).count() as u64;
            assert_eq!(numbers(&layer["load"]), (0..experts).map(|a| with(a, a)).collect::<Vec<_>>(), "{family}");
            for (a, row) in layer["together"].as_array().unwrap().iter().enumerate() {
                assert_eq!(numbers(row), (0..a).map(|b| with(a, b)).collect::<Vec<_>>(), "{family} {a}");
            }
            let most = (0..experts).map(|a| with(a, a)).max().unwrap() as f64;
            let max_vio = most * experts as f64 / ids.len() as f64 - 1.0;
            assert!((layer["max_vio"].as_f64().unwrap() - max_vio).abs() < 1e-9, "{family}");
            assert!((0.0..=1.0).contains(&layer["entropy"].as_f64().unwrap()));
        }
    }
}

#[test]
fn a_long_text_goes_on_from_pass_to_pass() {
    let copy = Copy::of("deepseek-v1");
    copy.edit("config.json", |json| json["max_position_embeddings"] = 4000.into());
    let text = PROMPT.repeat(30);
    let ids = Tokenizer::from_dir(&golden("deepseek-v1")).unwrap().encode(&text).unwrap();
    assert!(ids.len() > 1100 && ids.len() < 4000, "{}", ids.len());
    let usage = Case::new().counted(copy.argument(), &["--prompt", &text]);
    assert_eq!(usage["sequences"], 1);
    for (layer, (index, ids)) in usage["layers"].as_array().unwrap().iter().zip(chosen(copy.argument(), &ids)) {
        let difference = numbers(&layer["load"])
            .into_iter()
            .enumerate()
            .map(|(expert, load)| load.abs_diff(ids.iter().filter(|id| **id == expert).count() as u64));
        // Sums in another order may turn a near-tie.
        let difference = difference.sum::<u64>();
        assert!(difference <= 4, "layer {index}: {difference} of {} choices differ", ids.len());
    }
}

#[test]
fn a_text_beyond_the_context_is_cut_and_prompts_are_counted_together() {
    let (case, model) = (Case::new(), golden_argument("olmoe"));
    let whole = case.counted(&model, &["--prompt", PROMPT]);
    let tokens = whole["tokens"].as_u64().unwrap();
    let cut = case.counted(&model, &["--prompt", PROMPT, "--context", "7"]);
    assert_eq!((cut["tokens"].as_u64(), cut["sequences"].as_u64()), (Some(tokens), Some(tokens.div_ceil(7))));
    // The model ends at 512.
    let long = case.counted(&model, &["--prompt", &PROMPT.repeat(20), "--context", "100000"]);
    let tokens = long["tokens"].as_u64().unwrap();
    assert!(tokens > 512);
    assert_eq!(long["sequences"].as_u64(), Some(tokens.div_ceil(512)));

    let twice = case.counted(&model, &["--prompt", PROMPT, "--prompt", PROMPT]);
    assert_eq!(twice["text"], "2 prompts");
    for (once, twice) in whole["layers"].as_array().unwrap().iter().zip(twice["layers"].as_array().unwrap()) {
        let doubled: Vec<u64> = numbers(&once["load"]).into_iter().map(|load| 2 * load).collect();
        assert_eq!(doubled, numbers(&twice["load"]));
    }
}

#[test]
fn a_table_a_line_a_layer_from_any_source_of_text() {
    let (case, model) = (Case::new(), golden_argument("deepseek-v1"));
    let file = case.path("text.txt");
    fs::write(&file, format!("{PROMPT}\n")).unwrap();
    let table = run(&["route", "--model", &model, "--prompt-file", &file]).success();
    let mut lines = table.lines();
    let heading = lines.next().unwrap();
    assert!(heading.starts_with("deepseek-v1: deepseek, ") && heading.contains(" tokens of text.txt in 1 sequence"));
    assert!(lines.next().unwrap().is_empty());
    let columns: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(columns, ["layer", "entropy", "MaxVio", "busiest", "(share)", "unused"]);
    let layers = case.counted(&model, &["--prompt", PROMPT])["layers"].as_array().unwrap().clone();
    assert_eq!(lines.clone().count(), layers.len());
    for (line, layer) in lines.zip(&layers) {
        assert_eq!(line.split_whitespace().next().unwrap(), layer["layer"].to_string());
        assert!(line.contains(&format!("{:.2}", layer["max_vio"].as_f64().unwrap())), "{line}");
        let load = numbers(&layer["load"]);
        let most = load.iter().max().unwrap();
        let share = 100.0 * *most as f64 / load.iter().sum::<u64>() as f64;
        let busiest = load.iter().position(|load| load == most).unwrap();
        assert!(line.contains(&format!("  {busiest} ({share:.1}%)")), "{line}");
    }
    let spoken = run_with_input(&["route", "--model", &model], PROMPT.as_bytes()).success();
    assert_eq!(spoken.replace("standard input", "text.txt"), table);
}

#[test]
fn the_picture_shows_the_layer_asked_for() {
    let (case, model) = (Case::new(), golden_argument("deepseek-v3"));
    let plot = case.path("usage.svg");
    for layer in ["1", "2"] {
        run(&["route", "--model", &model, "--prompt", PROMPT, "--plot", &plot, "--layer", layer]).success();
        let svg = fs::read_to_string(&plot).unwrap();
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(svg.contains("Expert usage of deepseek-v3") && svg.contains("4 of 16 experts"), "{svg}");
        assert!(svg.contains(&format!("Experts of layer {layer} that are chosen together")), "{svg}");
    }
    let usage = case.counted(&model, &["--prompt", PROMPT, "--plot", &plot]);
    let max_vio = |layer: &&Value| layer["max_vio"].as_f64().unwrap();
    let layers = usage["layers"].as_array().unwrap();
    let most = layers.iter().max_by(|a, b| max_vio(a).total_cmp(&max_vio(b))).unwrap();
    let svg = fs::read_to_string(&plot).unwrap();
    assert!(svg.contains(&format!("Experts of layer {} that are chosen together", most["layer"])));
    assert_eq!(case.files(), BTreeSet::from(["usage.json".to_owned(), "usage.svg".to_owned()]));
}

#[test]
fn models_that_cannot_be_counted() {
    let case = Case::new();
    case.refused(&golden_argument("llama"), &["--prompt", "a"], 1, &["dense", "llama", "no experts"]);
    case.refused("/no/such/folder", &["--prompt", "a"], 1, &["/no/such/folder"]);
    let copy = Copy::of("mixtral");
    fs::remove_file(copy.path("tokenizer.json")).unwrap();
    case.refused(copy.argument(), &["--prompt", "a"], 1, &["tokenizer.json"]);
}

#[test]
fn requests_that_are_refused() {
    let (case, model) = (Case::new(), golden_argument("deepseek-v3"));
    let refused = |more: &[&str], words: &[&str]| case.refused(&model, more, 1, words);
    let plot = case.path("usage.svg");
    refused(&["--prompt", ""], &["prompt is empty"]);
    refused(&[], &["prompt is empty", "standard input"]);
    refused(&["--prompt-file", "no-such-file"], &["no-such-file"]);
    refused(&["--prompt", "a", "--plot", &plot, "--layer", "0"], &["layer 0 is dense", "from 1 to 2"]);
    refused(&["--prompt", "a", "--plot", &plot, "--layer", "3"], &["layer 3 does not exist"]);
    refused(&["--prompt", "a", "--memory-limit", "100K"], &["needs", "available"]);
    #[cfg(not(feature = "cuda"))]
    refused(&["--prompt", "a", "--device", "cuda"], &["no CUDA support"]);

    let wrong = |more: &[&str], words: &[&str]| case.refused(&model, more, 2, words);
    wrong(&["--prompt", "a", "--plot", "usage.png"], &["--plot", "ends in .svg"]);
    wrong(&["--prompt", "a", "--layer", "1"], &["required"]);
    wrong(&["--prompt", "a", "--prompt-file", "f"], &["--prompt-file"]);
    wrong(&["--prompt", "a", "--context", "0"], &["--context", "at least 1"]);
}

#[test]
fn files_that_cannot_be_written() {
    let (case, model) = (Case::new(), golden_argument("mixtral"));
    let refused = |more: &[&str], words: &[&str]| case.refused(&model, more, 1, words);
    refused(&["--prompt", "a", "--plot", &case.path("no/such/a.svg")], &["cannot create", "no/such/a.svg"]);
    let folder = PathBuf::from(case.path("folder.svg"));
    fs::create_dir(&folder).unwrap();
    refused(&["--prompt", "a", "--plot", folder.to_str().unwrap()], &["folder.svg", "directory"]);
    #[cfg(target_os = "linux")]
    run(&["route", "--model", &model, "--prompt", "a", "--json", "/dev/full"]).failure(1, &["/dev/full", "space"]);
}
