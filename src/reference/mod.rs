//! The specification: every operation in plain Rust, to be read beside the papers, and the CPU backend.

mod sampling;

pub use sampling::{Candidate, candidates, sample};
