//! cuBLASLt's functions, looked up when the program runs: nothing links to the library, and a program without it works.
//!
//! Names, values and layouts are those of `cublasLt.h`, which are the same in releases 12 and 13.

use std::{
    error::Error,
    ffi::{CStr, OsStr, OsString, c_char, c_int, c_void},
    mem, ptr,
};

/// `cublasStatus_t`.
pub(super) type Status = c_int;
/// `cublasLtHandle_t`, and the descriptors, which are pointers too.
pub(super) type Raw = *mut c_void;

pub(super) const SUCCESS: Status = 0;
pub(super) const NOT_SUPPORTED: Status = 15;

/// `cudaDataType_t`.
pub(super) const CUDA_R_32F: c_int = 0;
pub(super) const CUDA_R_16BF: c_int = 14;
/// `cublasComputeType_t`: float32 sums of exact products.
const COMPUTE_32F: c_int = 68;
/// `cublasLtMatmulDescAttributes_t`, and the `cublasOperation_t` that it takes.
const DESC_TRANSA: c_int = 3;
const OP_T: c_int = 1;
/// `cublasLtMatmulPreferenceAttributes_t`.
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
const PREF_REDUCTION_SCHEME_MASK: c_int = 3;
const PREF_MIN_ALIGNMENT_BYTES: [c_int; 4] = [5, 6, 7, 8];
/// `cublasLtReductionScheme_t`: parts of a sum are stored in float32, each in its place, and added up in a step of their own. The other
/// schemes add up in the result's type.
const REDUCTION_COMPUTE_TYPE: u32 = 2;

/// `cublasLtMatmulAlgo_t`: how to compute a product, opaque.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Default)]
#[repr(C)]
struct Candidate {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

macro_rules! functions {
    ($($name:ident: $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are used here.
        #[derive(Clone, Copy)]
        struct Functions {
            $($name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            /// # Safety
            /// The library is cuBLASLt.
            unsafe fn of(library: &libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of cuBLASLt's header.
                unsafe { Ok(Self { $($name: *library.get($symbol)?,)* }) }
            }
        }
    };
}

functions! {
    version: b"cublasLtGetVersion\0" () -> usize;
    status_name: b"cublasLtGetStatusName\0" (Status) -> *const c_char;
    create: b"cublasLtCreate\0" (*mut Raw) -> Status;
    destroy: b"cublasLtDestroy\0" (Raw) -> Status;
    desc_create: b"cublasLtMatmulDescCreate\0" (*mut Raw, c_int, c_int) -> Status;
    desc_set: b"cublasLtMatmulDescSetAttribute\0" (Raw, c_int, *const c_void, usize) -> Status;
    desc_destroy: b"cublasLtMatmulDescDestroy\0" (Raw) -> Status;
    layout_create: b"cublasLtMatrixLayoutCreate\0" (*mut Raw, c_int, u64, u64, i64) -> Status;
    layout_destroy: b"cublasLtMatrixLayoutDestroy\0" (Raw) -> Status;
    preference_create: b"cublasLtMatmulPreferenceCreate\0" (*mut Raw) -> Status;
    preference_set: b"cublasLtMatmulPreferenceSetAttribute\0" (Raw, c_int, *const c_void, usize) -> Status;
    preference_destroy: b"cublasLtMatmulPreferenceDestroy\0" (Raw) -> Status;
    heuristic: b"cublasLtMatmulAlgoGetHeuristic\0"
        (Raw, Raw, Raw, Raw, Raw, Raw, Raw, c_int, *mut Candidate, *mut c_int) -> Status;
    matmul: b"cublasLtMatmul\0"
        (Raw, Raw, *const c_void, *const c_void, Raw, *const c_void, Raw, *const c_void, *const c_void, Raw, *mut c_void,
         Raw, *const Algorithm, *mut c_void, usize, Raw) -> Status;
}

/// The loaded library.
#[derive(Clone)]
pub(super) struct Library {
    name: OsString,
    functions: Functions,
}

impl Library {
    /// Loads the first that can be, of cuBLASLt's names or of this one alone. In words, why none can.
    pub(super) fn load(path: Option<&OsStr>, release: i32) -> Result<Self, String> {
        let names = path.map_or_else(|| names(release), |path| vec![path.to_owned()]);
        let mut reason = String::new();
        for name in names {
            // SAFETY: a library of cuBLASLt's name, or one that the user named as such: its initialisers are cuBLASLt's.
            let loaded =
                unsafe { libloading::Library::new(&name).and_then(|library| Ok((Functions::of(&library)?, library))) };
            match loaded {
                Ok((functions, library)) => {
                    // It stays: CUDA keeps pointers into it until the process ends.
                    mem::forget(library);
                    return Ok(Self { name, functions });
                }
                Err(error) if reason.is_empty() => reason = in_words(&error),
                Err(_) => {}
            }
        }
        Err(reason)
    }

    /// What was loaded, and its release.
    pub(super) fn describe(&self) -> String {
        // SAFETY: the function takes nothing and returns a constant.
        let version = unsafe { (self.functions.version)() };
        let (major, minor, patch) = (version / 10_000, version / 100 % 100, version % 100);
        format!("{} {major}.{minor}.{patch}", self.name.to_string_lossy())
    }

    /// A status in cuBLASLt's own word.
    pub(super) fn name_of(&self, status: Status) -> String {
        // SAFETY: the function takes any status and returns a static, terminated string, or null.
        let name = unsafe { (self.functions.status_name)(status) };
        if name.is_null() {
            return format!("status {status}");
        }
        // SAFETY: not null, so such a string.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    /// A handle of the current context.
    pub(super) fn create(&self) -> Result<Raw, Status> {
        let mut handle = ptr::null_mut();
        // SAFETY: the function writes one pointer.
        checked(unsafe { (self.functions.create)(&raw mut handle) })?;
        Ok(handle)
    }

    /// # Safety
    /// The handle is [`Library::create`]'s and is used no more.
    pub(super) unsafe fn destroy(&self, handle: Raw) {
        // SAFETY: as the caller says. It fails only where the context is gone, and the handle with it.
        unsafe { (self.functions.destroy)(handle) };
    }
}

/// Sizes and types of `y = x W^T`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub(super) num_tokens: usize,
    pub(super) inner: usize,
    pub(super) out: usize,
    /// `cudaDataType_t` of y.
    pub(super) y_type: c_int,
}

/// A product as cuBLASLt describes it. It counts columns first: what is `[rows, columns]` here is `[columns, rows]` there, so that
/// its product is `y^T = W x^T`, with W, which it sees transposed, transposed back.
pub(super) struct Described<'a> {
    functions: &'a Functions,
    operation: Descriptor,
    weight: Descriptor,
    x: Descriptor,
    y: Descriptor,
}

/// A descriptor that gives itself back.
struct Descriptor {
    raw: Raw,
    destroy: unsafe extern "C" fn(Raw) -> Status,
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by the function's counterpart and owned by this value alone.
        unsafe { (self.destroy)(self.raw) };
    }
}

impl Descriptor {
    fn new(
        destroy: unsafe extern "C" fn(Raw) -> Status,
        create: impl FnOnce(*mut Raw) -> Status,
    ) -> Result<Self, Status> {
        let mut raw = ptr::null_mut();
        checked(create(&raw mut raw))?;
        Ok(Self { raw, destroy })
    }
}

impl<'a> Described<'a> {
    pub(super) fn new(library: &'a Library, product: &Product) -> Result<Self, Status> {
        let functions = &library.functions;
        let Product { num_tokens, inner, out, y_type } = *product;
        let layout = |kind, rows: usize, columns: usize| {
            Descriptor::new(functions.layout_destroy, |raw| {
                // SAFETY: the function writes one pointer and takes any numbers.
                unsafe { (functions.layout_create)(raw, kind, rows as u64, columns as u64, rows as i64) }
            })
        };
        let operation = Descriptor::new(functions.desc_destroy, |raw| {
            // SAFETY: the function writes one pointer and takes any numbers.
            unsafe { (functions.desc_create)(raw, COMPUTE_32F, CUDA_R_32F) }
        })?;
        let transposed = OP_T;
        // SAFETY: the descriptor was made above, the attribute is one 32-bit number.
        checked(unsafe {
            (functions.desc_set)(operation.raw, DESC_TRANSA, (&raw const transposed).cast(), size_of_val(&transposed))
        })?;
        Ok(Self {
            functions,
            operation,
            weight: layout(CUDA_R_16BF, inner, out)?,
            x: layout(CUDA_R_16BF, inner, num_tokens)?,
            y: layout(y_type, out, num_tokens)?,
        })
    }

    /// The way that cuBLASLt holds fastest, among those that give the same bits every time, with this much workspace and pointers
    /// aligned to 16 bytes; `None` if it has none.
    ///
    /// # Safety
    /// `handle` is of the same library, its context current.
    pub(super) unsafe fn algorithm(&self, handle: Raw, workspace: usize) -> Result<Option<Algorithm>, Status> {
        let functions = self.functions;
        let preference = Descriptor::new(functions.preference_destroy, |raw| {
            // SAFETY: the function writes one pointer.
            unsafe { (functions.preference_create)(raw) }
        })?;
        let set = |attribute, value: *const c_void, bytes| {
            // SAFETY: the descriptor was made above; each caller below passes a number of the attribute's size.
            checked(unsafe { (functions.preference_set)(preference.raw, attribute, value, bytes) })
        };
        let (most, schemes, alignment) = (workspace as u64, REDUCTION_COMPUTE_TYPE, 16_u32);
        set(PREF_MAX_WORKSPACE_BYTES, (&raw const most).cast(), size_of_val(&most))?;
        set(PREF_REDUCTION_SCHEME_MASK, (&raw const schemes).cast(), size_of_val(&schemes))?;
        for operand in PREF_MIN_ALIGNMENT_BYTES {
            set(operand, (&raw const alignment).cast(), size_of_val(&alignment))?;
        }
        let (mut found, mut count) = (Candidate::default(), 0);
        let Self { operation, weight, x, y, .. } = self;
        // SAFETY: all descriptors are alive; one candidate and one count are written.
        let status = unsafe {
            (functions.heuristic)(
                handle,
                operation.raw,
                weight.raw,
                x.raw,
                y.raw,
                y.raw,
                preference.raw,
                1,
                &raw mut found,
                &raw mut count,
            )
        };
        if status == NOT_SUPPORTED {
            return Ok(None);
        }
        checked(status)?;
        Ok((count > 0 && found.state == SUCCESS && found.workspace <= workspace).then_some(found.algorithm))
    }

    /// Launches the product.
    ///
    /// # Safety
    /// `handle` is of the same library, its context current; the pointers are of device memory of the described sizes, aligned to
    /// 16 bytes, `workspace` of as many bytes as `algorithm` was asked for with, all of them usable in the order of `stream`.
    pub(super) unsafe fn launch(
        &self,
        handle: Raw,
        algorithm: &Algorithm,
        at: &Pointers,
        stream: Raw,
    ) -> Result<(), Status> {
        let Self { functions, operation, weight, x, y } = self;
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: the descriptors are alive, the factors are read before the call returns, the rest is as the caller says. With a
        // factor of 0 what is added, here y itself, is not read.
        checked(unsafe {
            (functions.matmul)(
                handle,
                operation.raw,
                (&raw const one).cast(),
                at.weight,
                weight.raw,
                at.x,
                x.raw,
                (&raw const zero).cast(),
                at.y.cast_const(),
                y.raw,
                at.y,
                y.raw,
                ptr::from_ref(algorithm),
                at.workspace,
                at.workspace_bytes,
                stream,
            )
        })
    }
}

/// Device memory of a product.
pub(super) struct Pointers {
    pub(super) x: *const c_void,
    pub(super) weight: *const c_void,
    pub(super) y: *mut c_void,
    pub(super) workspace: *mut c_void,
    pub(super) workspace_bytes: usize,
}

/// What the system says, which the error itself only has as its source.
fn in_words(error: &libloading::Error) -> String {
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

fn checked(status: Status) -> Result<(), Status> {
    if status == SUCCESS { Ok(()) } else { Err(status) }
}

/// Names of the library, that of the kernels' own CUDA release first. 12 is the oldest that is known here; drivers run older releases.
fn names(release: i32) -> Vec<OsString> {
    let others = [13, 12].into_iter().filter(|other| *other != release);
    let versioned = |release: i32| {
        if cfg!(windows) { format!("cublasLt64_{release}.dll") } else { format!("libcublasLt.so.{release}") }
    };
    let mut names: Vec<OsString> = [release].into_iter().chain(others).map(versioned).map(OsString::from).collect();
    if !cfg!(windows) {
        names.push("libcublasLt.so".into());
    }
    names
}

#[cfg(test)]
mod tests {
    use super::{Candidate, Library, names};

    #[test]
    fn layouts_are_those_of_the_header() {
        assert_eq!((size_of::<Candidate>(), std::mem::offset_of!(Candidate, state)), (96, 72));
    }

    #[test]
    fn the_kernels_own_release_comes_first() {
        let first = names(13)[0].to_string_lossy().into_owned();
        assert!(first.contains("13"), "{first}");
        assert_eq!(names(13).iter().filter(|name| name.to_string_lossy().contains("13")).count(), 1);
    }

    #[test]
    fn a_missing_library_is_a_reason_in_words() {
        let reason = Library::load(Some("/nonexistent/libcublasLt.so".as_ref()), 13).err().unwrap();
        assert!(reason.contains("/nonexistent/libcublasLt.so"), "{reason}");
    }

    /// A library that is another's, with none of the functions.
    #[test]
    #[cfg(target_os = "linux")]
    fn another_library_is_a_reason_in_words() {
        let reason = Library::load(Some("libc.so.6".as_ref()), 13).err().unwrap();
        assert!(reason.contains("cublasLtGetVersion"), "{reason}");
    }
}
