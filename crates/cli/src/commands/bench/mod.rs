//! `anabranch bench`: how fast an operation is on this machine's GPU.

#[cfg(feature = "cuda")]
mod bars;
#[cfg(feature = "cuda")]
mod ceilings;
#[cfg(feature = "cuda")]
mod check;
#[cfg(feature = "cuda")]
mod logits;
#[cfg(feature = "cuda")]
mod measure;
#[cfg(feature = "cuda")]
mod model;
#[cfg(feature = "cuda")]
mod moe;
#[cfg(not(feature = "cuda"))]
mod no_cuda;
#[cfg(not(feature = "cuda"))]
use no_cuda as moe;
#[cfg(not(feature = "cuda"))]
use no_cuda as model;
#[cfg(feature = "cuda")]
mod record;
#[cfg(feature = "cuda")]
mod roofline;
#[cfg(feature = "cuda")]
mod shapes;

use crate::failure::Failure;

/// Measure how fast an operation is on this machine's GPU
#[derive(clap::Args)]
#[command(after_help = "Example:\n  anabranch bench moe --preset all --json results.json --plot roofline.svg")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    operation: Operation,
}

#[derive(clap::Subcommand)]
enum Operation {
    /// Measure the MoE layer, from router logits or hidden states to its output
    Moe(moe::Arguments),
    /// Measure whole models with random weights: decoding, and reading prompts
    Model(model::Arguments),
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    match &arguments.operation {
        Operation::Moe(arguments) => moe::run(arguments),
        Operation::Model(arguments) => model::run(arguments),
    }
}
