//! `anabranch bench`.

use crate::support::run;

/// Without kernels nothing is measured, whatever is asked for.
#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_kernels_says_so() {
    run(&["bench", "moe"]).failure(1, &["no CUDA support", "--features cuda"]);
    run(&["bench", "moe", "--preset", "all", "--json", "results.json"]).failure(1, &["no CUDA support"]);
    run(&["bench", "model", "--config", "qwen3-30b-a3b"]).failure(1, &["no CUDA support"]);
}

#[cfg(feature = "cuda")]
#[test]
fn what_makes_no_sense_is_refused_before_a_gpu_is_looked_for() {
    run(&["bench", "moe"]).failure(2, &["required"]);
    run(&["bench", "moe", "--preset", "qwen3", "--hidden", "64"]).failure(2, &["--preset"]);
    let sizes = ["bench", "moe", "--hidden", "64", "--intermediate", "8", "--experts", "4", "--topk", "5"];
    run(&sizes).failure(1, &["topk must be 1 to 4"]);
    run(&["bench", "moe", "--preset", "qwen3", "--from", "hidden", "--routing", "zipf"]).failure(1, &["--from hidden"]);
    run(&["bench", "moe", "--preset", "qwen3", "--logits", "/nonexistent"]).failure(1, &["cannot read /nonexistent"]);
    run(&["bench", "moe", "--preset", "qwen3", "--device", "cpu"]).failure(1, &["processor"]);
    run(&["bench", "model"]).failure(2, &["required"]);
    run(&["bench", "model", "--config", "qwen4"]).failure(1, &["qwen4: no such file, and no preset"]);
    run(&["bench", "model", "--config", "llama-2-7b", "--context", "4096"])
        .failure(1, &["4096 positions", "4168 tokens"]);
    run(&["bench", "model", "--config", "llama-2-7b", "--device", "cpu"]).failure(1, &["processor"]);
}

#[test]
fn an_operation_must_be_named() {
    assert_eq!(run(&["bench"]).code, Some(2));
}
