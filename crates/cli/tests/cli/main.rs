//! The binary from outside: what it prints, how it ends, and what it leaves behind.

mod bad_checkpoints;
mod bench;
mod doctor;
mod generate;
mod init;
mod inspect;
#[cfg(unix)]
mod interrupt;
mod logits;
mod output;
mod route;
mod support;
mod usage;
