//! What a build without kernels says.

use crate::failure::Failure;

/// Needs a build with CUDA
#[derive(clap::Args)]
#[command(after_help = "This build has no CUDA support. With a CUDA toolkit (or after `cargo xtask toolchain`):\n  \
    cargo build --release --package anabranch-cli --features cuda")]
pub(crate) struct Arguments {
    #[arg(hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    _options: Vec<String>,
}

pub(crate) fn run(_: &Arguments) -> Result<(), Failure> {
    Err(Failure::Failed("this build has no CUDA support; build it with --features cuda".to_owned()))
}
