//! The repository's own commands, without a dependency, so that a fresh machine runs the first one at once.

mod candle;
mod capi;
mod demo;
mod deny;
mod golden;
mod process;
mod python;
mod stage;
mod test;
mod toolchain;

use std::{env, process::ExitCode};

/// Why a command stopped.
enum Failure {
    /// It was called with arguments that it does not know: exit code 2.
    Usage(String),
    /// It ran and failed: exit code 1.
    Failed(String),
}

struct Command {
    name: &'static str,
    arguments: &'static str,
    summary: &'static str,
    run: fn(&[String]) -> Result<(), Failure>,
}

const COMMANDS: &[Command] = &[
    Command {
        name: "candle",
        arguments: "",
        summary: "build and test crates/candle, with the CUDA libraries that candle links",
        run: candle::run,
    },
    Command {
        name: "capi",
        arguments: "[DIR]",
        summary: "build the C library and lay it out for installation: header, libraries, pkg-config file",
        run: capi::run,
    },
    Command {
        name: "demo",
        arguments: "",
        summary: "build the command-line tool and generate text from the bundled tiny checkpoint",
        run: demo::run,
    },
    Command {
        name: "stage",
        arguments: "[DIR]",
        summary: "gather GPU tests, benches and the tool in a folder for a GPU host without Rust or nvcc",
        run: stage::run,
    },
    Command {
        name: "test",
        arguments: "[STEP ...]",
        summary: "everything that this machine can check, or only the named steps",
        run: test::run,
    },
    Command {
        name: "toolchain",
        arguments: "",
        summary: "bring nvcc, libclang and clang-format into target/toolchain where they are missing",
        run: toolchain::run,
    },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = match arguments.split_first() {
        None => {
            help();
            Ok(())
        }
        Some((name, _)) if matches!(name.as_str(), "help" | "--help" | "-h") => {
            help();
            Ok(())
        }
        Some((name, rest)) => match COMMANDS.iter().find(|command| command.name == name) {
            Some(command) => (command.run)(rest),
            None => Err(Failure::Usage(format!("there is no command `{name}`; `cargo xtask help` lists them"))),
        },
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(message)) => {
            eprintln!("error: {message}");
            ExitCode::from(1)
        }
        Err(Failure::Usage(message)) => {
            eprintln!("error: {message}");
            ExitCode::from(2)
        }
    }
}

fn help() {
    println!("Usage: cargo xtask COMMAND\n");
    for command in COMMANDS {
        let usage = format!("{} {}", command.name, command.arguments);
        println!("  {usage:<18}{}", command.summary);
    }
    println!("\nSteps of `test`: {}", test::step_names().join(", "));
}
