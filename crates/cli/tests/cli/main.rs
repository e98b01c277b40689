//! The binary from outside: what it prints, how it ends, and what it leaves behind.

mod doctor;
mod inspect;
mod output;
mod support;
mod usage;
