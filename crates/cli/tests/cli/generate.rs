//! `anabranch generate`.

use crate::support::{Copy, anabranch, golden_argument, run, run_with_input, wait};
use serde_json::Value;
use std::{fs, io::Read, process::Stdio};

const PROMPT: &str = "A mixture of experts sends every token to";

/// Runs on a golden checkpoint, with a few tokens unless `more` says otherwise.
fn generate(family: &str, more: &[&str]) -> crate::support::Run {
    run(&[&["generate", "--model", &golden_argument(family)], more].concat())
}

fn text(family: &str, more: &[&str]) -> String {
    let text = generate(family, more).success();
    text.strip_suffix('\n').expect("the text ends with a line end").to_owned()
}

#[test]
fn the_same_command_gives_the_same_text() {
    let greedy = ["--prompt", PROMPT, "--max-new-tokens", "12"];
    assert!(!text("deepseek-v1", &greedy).is_empty());
    assert_eq!(text("deepseek-v1", &greedy), text("deepseek-v1", &greedy));
    let sampled = |seed| text("deepseek-v1", &[&greedy[..], &["--temperature", "1.5", "--seed", seed]].concat());
    assert_eq!(sampled("1"), sampled("1"));
    assert_ne!(sampled("1"), sampled("2"));
}

#[test]
fn every_sampling_option_is_taken() {
    let greedy = text("mixtral", &["--prompt", PROMPT, "--max-new-tokens", "12"]);
    // One candidate is the likeliest one, whatever the temperature.
    let one = ["--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "3", "--seed", "5"];
    let with = |more: &[&str]| text("mixtral", &[&one[..], more].concat());
    assert_ne!(with(&[]), greedy);
    assert_eq!(with(&["--top-k", "1"]), greedy);
    assert_eq!(with(&["--top-p", "0.000001"]), greedy);
    assert_eq!(with(&["--min-p", "0.999999"]), greedy);
    // A filter alone means sampling, at temperature 1.
    let filtered = |more: &[&str]| {
        text("mixtral", &[&["--prompt", PROMPT, "--max-new-tokens", "12", "--top-p", "0.99"], more].concat())
    };
    assert_eq!(filtered(&[]), filtered(&["--temperature", "1"]));
    assert_ne!(filtered(&[]), filtered(&["--temperature", "0"]));
    let penalized = text("mixtral", &["--prompt", PROMPT, "--max-new-tokens", "12", "--repetition-penalty", "50"]);
    assert_ne!(penalized, greedy);
}

#[test]
fn a_prompt_comes_from_an_option_a_file_or_standard_input() {
    let expected = text("olmoe", &["--prompt", PROMPT, "--max-new-tokens", "6"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    fs::write(&file, format!("{PROMPT}\n")).unwrap();
    assert_eq!(text("olmoe", &["--prompt-file", file.to_str().unwrap(), "--max-new-tokens", "6"]), expected);
    let model = golden_argument("olmoe");
    let arguments = ["generate", "--model", &model, "--max-new-tokens", "6"];
    assert_eq!(run_with_input(&arguments, PROMPT.as_bytes()).success(), format!("{expected}\n"));
}

#[test]
fn several_prompts_give_what_each_gives_alone() {
    let options = ["--max-new-tokens", "6"];
    let alone = |prompt| text("qwen3-moe", &[&["--prompt", prompt], &options[..]].concat());
    let (first, second) = (alone(PROMPT), alone("One"));
    let both = generate("qwen3-moe", &[&["--prompt", PROMPT, "--prompt", "One"], &options[..]].concat()).success();
    assert_eq!(both, format!("==> prompt 1 of 2 <==\n{first}\n==> prompt 2 of 2 <==\n{second}\n"));
}

#[test]
fn the_lines_of_a_file_are_prompts() {
    let options = ["--max-new-tokens", "40"];
    let prompts: Vec<String> = (0..9).map(|index| format!("{PROMPT} {index}{}", " and so on".repeat(index))).collect();
    let asked: Vec<&str> = prompts.iter().flat_map(|prompt| ["--prompt", prompt]).collect();
    let expected = generate("qwen3-moe", &[&asked, &options[..]].concat()).success();
    assert!(expected.starts_with("==> prompt 1 of 9 <==\n") && expected.contains("==> prompt 9 of 9 <==\n"));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.txt");
    let from_file = |text: String, more: &[&str]| {
        fs::write(&file, text).unwrap();
        generate("qwen3-moe", &[&["--prompt-file", file.to_str().unwrap()], &options[..], more].concat())
    };
    assert_eq!(from_file(prompts.join("\n") + "\n", &[]).success(), expected);
    assert_eq!(from_file(prompts.join("\r\n"), &["--batch-size", "2"]).success(), expected);
    // Too little cache for two of the longer ones.
    assert_eq!(from_file(prompts.join("\n"), &["--cache-tokens", "256"]).success(), expected);
    from_file("One\n\nTwo\n".to_owned(), &[]).failure(1, &["prompts.txt: line 2 is empty"]);
    from_file(prompts.join("\n"), &["--cache-tokens", "64"]).failure(1, &["a prompt of", "cache, which holds 64"]);
}

#[test]
fn the_chat_template_changes_the_prompt() {
    let plain = text("deepseek-v2", &["--prompt", PROMPT, "--max-new-tokens", "8"]);
    let chat = text("deepseek-v2", &["--prompt", PROMPT, "--max-new-tokens", "8", "--chat"]);
    assert_ne!(plain, chat);
    // What the golden checkpoints' template writes around the message.
    let written = format!("<bos>user: {PROMPT}\nassistant:");
    assert_eq!(text("deepseek-v2", &["--prompt", &written, "--max-new-tokens", "8"]), chat);
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let whole = text("glm4-moe", &["--prompt", PROMPT, "--max-new-tokens", "24"]);
    let middle: String = whole.chars().skip(whole.chars().count() / 2).take(3).collect();
    let stopped =
        text("glm4-moe", &["--prompt", PROMPT, "--max-new-tokens", "24", "--stop", "not there", "--stop", &middle]);
    assert_eq!(stopped, whole[..whole.find(&middle).unwrap()]);
}

#[test]
fn statistics_go_to_stderr() {
    let run = generate("deepseek-v1", &["--prompt", PROMPT, "--max-new-tokens", "4", "--stats"]);
    for words in ["loading", "prefill", "decode", "tokens/s", "3 tokens"] {
        assert!(run.stderr.contains(words), "{words} in {}", run.stderr);
    }
    assert!(cfg!(not(target_os = "linux")) || run.stderr.contains("peak memory"), "{}", run.stderr);
    assert_eq!(run.success(), generate("deepseek-v1", &["--prompt", PROMPT, "--max-new-tokens", "4"]).success());
}

#[test]
fn logging_is_asked_for_and_goes_to_stderr() {
    let model = golden_argument("llama");
    let arguments = ["generate", "--model", &model, "--prompt", "a", "--max-new-tokens", "1"];
    let quiet = anabranch(&arguments).output().unwrap();
    assert!(quiet.stderr.is_empty());
    let told = anabranch(&arguments).env("RUST_LOG", "info").output().unwrap();
    assert!(String::from_utf8_lossy(&told.stderr).contains("INFO"));
    assert_eq!(told.stdout, quiet.stdout);
}

#[test]
fn a_closed_pipe_ends_the_run_quietly() {
    let model = golden_argument("llama");
    let arguments = ["generate", "--model", &model, "--prompt", PROMPT, "--max-new-tokens", "400"];
    let mut child = anabranch(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    drop(stdout);
    let run = wait(child);
    assert_eq!((run.code, run.stderr.as_str()), (Some(0), ""));
}

#[test]
fn prompts_that_are_refused() {
    let refused = |more: &[&str], words: &[&str]| generate("llama", more).failure(1, words);
    refused(&["--prompt", ""], &["prompt is empty", "--prompt"]);
    refused(&["--prompt", "a", "--prompt", ""], &["prompt is empty"]);
    refused(&[], &["prompt is empty", "standard input"]);
    refused(&["--prompt-file", "no-such-file"], &["no-such-file", "No such file"]);
    refused(&["--prompt", &"word ".repeat(600)], &["512"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("p.txt");
    fs::write(&file, b"caf\xe9 au lait").unwrap();
    refused(&["--prompt-file", file.to_str().unwrap()], &["p.txt is not UTF-8", "0xe9", "offset 3"]);
    let model = golden_argument("llama");
    run_with_input(&["generate", "--model", &model], b"\xff").failure(1, &["standard input is not UTF-8"]);
}

#[test]
fn options_that_are_refused() {
    let refused = |more: &[&str], words: &[&str]| {
        generate("llama", &[&["--prompt", "a"], more].concat()).failure(2, words);
    };
    refused(&["--prompt-file", "f"], &["--prompt-file"]);
    refused(&["--max-new-tokens", "0"], &["--max-new-tokens", "at least 1"]);
    refused(&["--temperature", "-1"], &["-1"]);
    refused(&["--temperature", "nan"], &["--temperature", "0 or more"]);
    refused(&["--temperature", "1", "--top-p", "0"], &["--top-p", "above 0"]);
    refused(&["--temperature", "1", "--min-p", "1"], &["--min-p", "below 1"]);
    refused(&["--temperature", "1", "--top-k", "0"], &["--top-k", "at least 1"]);
    refused(&["--batch-size", "0"], &["--batch-size", "at least 1"]);
    refused(&["--cache-tokens", "0"], &["--cache-tokens", "at least 1"]);
    refused(&["--repetition-penalty", "0"], &["--repetition-penalty"]);
    refused(&["--stop", ""], &["--stop"]);
    refused(&["--memory-limit", "lots"], &["--memory-limit", "512M"]);
}

#[test]
fn what_this_machine_and_build_cannot_do() {
    let refused = |more: &[&str], words: &[&str]| {
        generate("llama", &[&["--prompt", "a"], more].concat()).failure(1, words);
    };
    #[cfg(not(feature = "cuda"))]
    refused(&["--device", "cuda:0"], &["no CUDA support", "--device cpu"]);
    #[cfg(feature = "cuda")]
    refused(&["--device", "cuda:1000"], &["no usable CUDA GPU"]);
    #[cfg(feature = "cuda")]
    refused(&["--device", "cuda", "--dtype", "f32"], &["bf16 only", "--device cpu"]);
    refused(&["--device", "cpu", "--dtype", "bf16"], &["f32 only"]);
    refused(&["--memory-limit", "100K"], &["needs", "available"]);
    run(&["generate", "--model", "/no/such/folder", "--prompt", "a"]).failure(1, &["/no/such/folder"]);
}

#[test]
fn random_weights_are_for_a_gpu() {
    let random = |more: &[&str]| run(&[&["generate", "--random-weights"], more].concat());
    random(&["olmoe-1b-7b", "--prompt", "a", "--device", "cpu"]).failure(1, &["random weights", "`anabranch init`"]);
    random(&["no-such-preset", "--prompt", "a", "--device", "cpu"]).failure(1, &["no such file", "olmoe-1b-7b"]);
    random(&["olmoe-1b-7b", "--model", "x", "--prompt", "a"]).failure(2, &["cannot be used with"]);
    run(&["generate", "--prompt", "a"]).failure(2, &["required arguments"]);
}

#[test]
fn a_checkpoint_without_a_chat_template() {
    let copy = Copy::of("llama");
    copy.edit("tokenizer_config.json", |json| json["chat_template"] = Value::Null);
    run(&["generate", "--model", copy.argument(), "--prompt", "a", "--chat"]).failure(1, &["chat"]);
}
