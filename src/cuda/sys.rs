//! `kernels/include/anabranch.h` in Rust, made by bindgen. Public for the C library alone: it changes with the header.

#![allow(non_camel_case_types, non_upper_case_globals, reason = "C's names")]
#![allow(dead_code, missing_docs, unreachable_pub, reason = "the header serves C callers too")]
#![allow(clippy::pedantic, reason = "generated")]

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
