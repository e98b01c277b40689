//! `anabranch init`: a random checkpoint of any configuration.

use crate::{disk, failure::Failure, interrupt, output, progress, source::configuration, units};
use anabranch::Dtype;
use anabranch_model::{
    Error,
    init::{InitOptions, init},
};
use std::path::{Path, PathBuf};

/// Make a random checkpoint in the Hugging Face layout, to try sizes and speeds without a download
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    anabranch init --config olmoe-1b-7b --out random-olmoe\n  \
    anabranch init --config my/config.json --out tiny --dtype f32 --seed 7\n\n\
    The same seed gives the same weights, however they are sharded. The folder appears whole or not at all.\n\
    `anabranch inspect --model PRESET` tells beforehand how large it will be.")]
pub(crate) struct Arguments {
    /// A config.json, the folder that holds it, or the name of a published configuration
    #[arg(long, value_name = "FILE|PRESET")]
    config: String,
    /// Folder to make; new, or empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Start of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Store all weights in this type [default: what the configuration says, FP8 included]
    #[arg(long, value_enum)]
    dtype: Option<StoredDtype>,
    /// Most bytes of tensors in one file, as 500M or 5G [default: 5,000,000,000]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    shard_size: Option<u64>,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum StoredDtype {
    F32,
    Bf16,
    F16,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let (path, text) = configuration(&arguments.config)?;
    let default = InitOptions::default();
    let options = InitOptions {
        seed: arguments.seed,
        dtype: arguments.dtype.map(|dtype| match dtype {
            StoredDtype::F32 => Dtype::F32,
            StoredDtype::Bf16 => Dtype::Bf16,
            StoredDtype::F16 => Dtype::F16,
        }),
        shard_bytes: arguments.shard_size.unwrap_or(default.shard_bytes),
    };
    let mut written = 0;
    interrupt::deferred(|| {
        progress::writing(|report| {
            init(&path, &text, &arguments.out, &options, &mut |done, total| {
                if written == 0 {
                    check_disk(&arguments.out, total)?;
                }
                written = done;
                report(done, total);
                if interrupt::requested() { Err(Error::Interrupted) } else { Ok(()) }
            })
        })
    })?;
    output::print(&format!("{}: {} of random weights\n", arguments.out.display(), units::bytes(written)))
}

/// Fails at once rather than after an hour of writing.
fn check_disk(out: &Path, needed: u64) -> Result<(), Error> {
    let parent = out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match disk::free(parent) {
        Some(free) if free < needed => Err(Error::Input(format!(
            "{} needs {} of disk space, but {} is free; choose another --out",
            out.display(),
            units::bytes(needed),
            units::bytes(free)
        ))),
        _ => Ok(()),
    }
}
