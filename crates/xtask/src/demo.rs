//! `cargo xtask demo`: from a fresh checkout to generated text.

use crate::{
    Failure,
    process::{cargo, run as run_process},
};

/// Weights drawn at random, 64 wide, in the repository so that a checkout is complete by itself.
const CHECKPOINT: &str = "tests/golden/models/deepseek-v1";
const PROMPT: &str = "A mixture of experts sends every token to";

/// Builds the command-line tool alone and lets it speak.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    if let Some(argument) = arguments.first() {
        return Err(Failure::Usage(format!("`demo` takes no arguments, got `{argument}`")));
    }
    run_process(&mut cargo(["build", "--release", "--package", "anabranch-cli"]))?;
    println!("\nThe bundled checkpoint ({CHECKPOINT}) is tiny and its weights are random:");
    println!("the words that follow are noise, made in the way that a real checkpoint's are.\n");
    let mut generate = cargo(["run", "--release", "--quiet", "--package", "anabranch-cli", "--", "generate"]);
    run_process(generate.args(["--model", CHECKPOINT, "--prompt", PROMPT, "--max-new-tokens", "32", "--stats"]))
}
