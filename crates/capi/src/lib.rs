//! The C library, `libanabranch`: the functions of `kernels/include/anabranch.h`, which is its documentation, with errors
//! in words and with plans. It adds no arithmetic: launchers go to the kernels, plans to [`anabranch::cuda::MoeLayer`].
//!
//! Every function may be called from any thread, and none lets a panic out. That each is defined as the header declares
//! it is checked when this is compiled.
#![cfg(feature = "cuda")]

pub mod launchers;
pub mod plan;
pub mod report;
mod routing;
mod runtime;

/// Checks at compile time that the header declares a function with these types. The function is never called or
/// compiled, so that the header's own functions need no definition in the kernels.
macro_rules! declared {
    ($name:ident($($argument:ty),*) $(-> $result:ty)?) => {
        const _: () = {
            #[expect(dead_code, reason = "compiled for its types alone")]
            fn declared() {
                let _: unsafe extern "C" fn($($argument),*) $(-> $result)? = anabranch::cuda::sys::$name;
            }
        };
    };
}
pub(crate) use declared;
