//! `anabranch`: runs, inspects and makes mixture-of-experts checkpoints.
//!
//! Exit codes: 0 done, 1 failed, 2 wrong usage. A failure is one sentence on stderr.

mod commands;
mod device;
mod disk;
mod failure;
mod interrupt;
mod memory;
mod output;
mod progress;
mod prompts;
mod source;
mod svg;
mod units;

use clap::{Parser, Subcommand};
use std::{io, process::ExitCode};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

#[derive(Parser)]
#[command(
    name = "anabranch",
    version,
    about = "Run, inspect and make mixture-of-experts checkpoints in the Hugging Face layout",
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage.\n\
        Environment: RUST_LOG=info (or debug, trace) tells on stderr what is going on."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Generate(commands::generate::Arguments),
    Logits(commands::logits::Arguments),
    Route(commands::route::Arguments),
    Inspect(commands::inspect::Arguments),
    Init(commands::init::Arguments),
    Bench(commands::bench::Arguments),
    Doctor(commands::doctor::Arguments),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(message) => return usage(&message),
    };
    start_logging();
    let result = interrupt::install().and_then(|()| match cli.command {
        Command::Generate(arguments) => commands::generate::run(&arguments),
        Command::Logits(arguments) => commands::logits::run(&arguments),
        Command::Route(arguments) => commands::route::run(&arguments),
        Command::Inspect(arguments) => commands::inspect::run(&arguments),
        Command::Init(arguments) => commands::init::run(&arguments),
        Command::Bench(arguments) => commands::bench::run(&arguments),
        Command::Doctor(arguments) => commands::doctor::run(&arguments),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Prints what the parser has to say: help and version on stdout, anything else on stderr with exit code 2.
fn usage(message: &clap::Error) -> ExitCode {
    match message.print() {
        _ if message.use_stderr() => ExitCode::from(2),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::Failure::Output(error).report(),
    }
}

fn start_logging() {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::WARN.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
}
