//! cuBLASLt for dense products, where it is installed. Which products is decided in `linear.rs`.

mod library;

use std::{
    collections::HashMap,
    env,
    ffi::{OsStr, OsString, c_void},
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use cudarc::driver::{CudaContext, CudaSlice, DevicePtr};
use half::bf16;

use self::library::{
    Algorithm, CUDA_R_16BF, CUDA_R_32F, Described, Library, NOT_SUPPORTED, Pointers, Product, Raw, Status,
};
use super::{
    GemmOutput, Stream,
    launch::{Launch, Pointer},
    sys::{AnabranchDtype, anabranch_runtime_version},
};
use crate::{Error, Result};

/// Says whether to use it, or which.
const VARIABLE: &str = "ANABRANCH_CUBLASLT";

/// What NVIDIA recommends for Hopper, and more than older GPUs need.
const WORKSPACE: usize = 32 << 20;

/// Products whose algorithm is remembered. Where more come, all are forgotten and asked for again: the answers stay the same.
const REMEMBERED: usize = 4096;

/// Name and release of the cuBLASLt that [`Stream::enable_cublaslt`] would use. No GPU is needed to ask.
///
/// # Errors
/// Those of [`Stream::enable_cublaslt`] that are about the library.
pub fn cublaslt_version() -> Result<String> {
    Ok(find()?.describe())
}

/// A stream's cuBLASLt: a handle, memory to work in, and the algorithms chosen so far.
pub(super) struct CublasLt {
    library: Library,
    handle: Raw,
    context: Arc<CudaContext>,
    workspace: CudaSlice<u8>,
    least_tokens: usize,
    /// `None` where cuBLASLt has none.
    algorithms: Mutex<HashMap<Product, Option<Algorithm>>>,
}

// SAFETY: cuBLASLt's functions may be called by several threads with one handle, and a handle belongs to no thread.
unsafe impl Send for CublasLt {}
// SAFETY: as above; the algorithms are behind a mutex.
unsafe impl Sync for CublasLt {}

impl fmt::Debug for CublasLt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CublasLt").field("library", &self.library.describe()).finish_non_exhaustive()
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the handle was made in this context by the same library, and goes with its owner.
            unsafe { self.library.destroy(self.handle) };
        }
    }
}

impl CublasLt {
    /// On a stream's GPU, with 32 MiB of its memory.
    pub(super) fn new(stream: &Stream, least_tokens: usize) -> Result<Self> {
        let library = find()?;
        let device = stream.device();
        Launch::bind("enable_cublaslt", device)?;
        let workspace = stream.alloc(WORKSPACE)?;
        // The first call that reaches the GPU: a library that is too new for the driver fails here.
        let handle = library.create().map_err(|status| Error::NoCublasLt {
            reason: format!("{} cannot use this GPU: {}", library.describe(), library.name_of(status)),
        })?;
        let context = Arc::clone(device.context());
        Ok(Self { library, handle, context, workspace, least_tokens, algorithms: Mutex::default() })
    }

    /// The fewest tokens of a product that may be computed here.
    pub(super) fn least_tokens(&self) -> usize {
        self.least_tokens
    }

    /// Bytes of GPU memory that are held.
    pub(super) fn workspace_bytes(&self) -> usize {
        self.workspace.num_bytes()
    }

    /// Launches `y[T, out] = x[T, in] W[out, in]^T`. False, and nothing launched, if cuBLASLt has no algorithm that
    /// gives the same bits every time, or a pointer is not aligned to 16 bytes.
    ///
    /// # Safety
    /// The pointers are of device memory of these shapes that may be used on the launch's stream, whose handle this is.
    pub(super) unsafe fn multiply<Y: GemmOutput>(
        &self,
        launch: Launch<'_>,
        [num_tokens, inner, out]: [usize; 3],
        x: &Pointer<'_, bf16>,
        weight: &Pointer<'_, bf16>,
        y: &Pointer<'_, Y>,
    ) -> Result<bool> {
        let (x, weight, y): (*const c_void, *const c_void, *mut c_void) =
            (x.pointer.cast_const().cast(), weight.pointer.cast_const().cast(), y.pointer.cast());
        if [x, weight, y.cast_const()].iter().any(|pointer| !pointer.addr().is_multiple_of(16)) {
            return Ok(false);
        }
        let y_type = if Y::DTYPE == AnabranchDtype::ANABRANCH_DTYPE_F32 { CUDA_R_32F } else { CUDA_R_16BF };
        let product = Product { num_tokens, inner, out, y_type };
        // Where a kernel failed before, the driver says so at every call, and cuBLASLt only that it cannot go on.
        let failed = |status: Status| match self.context.mem_get_info() {
            Err(error) => launch.stream.driver(launch.operation, error),
            Ok(_) => Error::Launch {
                operation: launch.operation,
                reason: format!("{} reports {}", self.library.describe(), self.library.name_of(status)),
            },
        };
        let described = Described::new(&self.library, &product).map_err(failed)?;
        let Some(algorithm) = self.algorithm(&described, product).map_err(failed)? else { return Ok(false) };
        let stream = launch.stream.cudarc();
        let (workspace, _guard) = self.workspace.device_ptr(stream);
        let at = Pointers { x, weight, y, workspace: workspace as *mut c_void, workspace_bytes: WORKSPACE };
        // SAFETY: `launch` has made the context current; the workspace is this stream's own, whose launches follow each other; the
        // other pointers are as the caller says and were found to be aligned.
        match unsafe { described.launch(self.handle, &algorithm, &at, stream.cu_stream().cast()) } {
            Ok(()) => Ok(true),
            Err(NOT_SUPPORTED) => {
                self.remember(product, None);
                Ok(false)
            }
            Err(status) => Err(failed(status)),
        }
    }

    fn algorithm(&self, described: &Described<'_>, product: Product) -> Result<Option<Algorithm>, Status> {
        // Algorithms are plain numbers, whole whatever happened to a thread that held the lock.
        let known = self.algorithms.lock().unwrap_or_else(PoisonError::into_inner).get(&product).copied();
        if let Some(known) = known {
            return Ok(known);
        }
        // SAFETY: the handle is the library's, and whoever launches has made its context current.
        let chosen = unsafe { described.algorithm(self.handle, WORKSPACE) }?;
        self.remember(product, chosen);
        Ok(chosen)
    }

    fn remember(&self, product: Product, algorithm: Option<Algorithm>) {
        let mut algorithms = self.algorithms.lock().unwrap_or_else(PoisonError::into_inner);
        if algorithms.len() >= REMEMBERED {
            algorithms.clear();
        }
        algorithms.insert(product, algorithm);
    }
}

fn find() -> Result<Library> {
    // SAFETY: the function reads a constant.
    let release = unsafe { anabranch_runtime_version() } / 1000;
    match Wanted::of(env::var_os(VARIABLE).as_deref()) {
        Wanted::No => Err(Error::NoCublasLt { reason: format!("{VARIABLE} is off") }),
        Wanted::Any => Library::load(None, release).map_err(|reason| Error::NoCublasLt { reason }),
        // Who names one wants that one.
        Wanted::This(path) => Library::load(Some(&path), release).map_err(|reason| Error::Setting {
            operation: "enable_cublaslt",
            setting: VARIABLE,
            expected: "auto, off or the path of cuBLASLt's library".to_owned(),
            got: format!("{} ({reason})", path.to_string_lossy()),
        }),
    }
}

/// What the environment asks for.
#[derive(Debug, PartialEq)]
enum Wanted {
    Any,
    No,
    This(OsString),
}

impl Wanted {
    fn of(variable: Option<&OsStr>) -> Self {
        match variable.and_then(OsStr::to_str) {
            Some("off") => Self::No,
            Some("" | "auto") => Self::Any,
            _ => variable.map_or(Self::Any, |path| Self::This(path.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Wanted, find,
        library::{CUDA_R_16BF, Described, NOT_SUPPORTED, Product},
    };

    #[test]
    fn the_environment_turns_it_off_or_names_one() {
        let of = |variable: &str| Wanted::of(Some(variable.as_ref()));
        assert_eq!(
            (Wanted::of(None), of(""), of("auto"), of("off")),
            (Wanted::Any, Wanted::Any, Wanted::Any, Wanted::No)
        );
        assert_eq!(of("/opt/libcublasLt.so.13"), Wanted::This("/opt/libcublasLt.so.13".into()));
    }

    /// What needs no GPU, where the library is: its functions are there, and take what is passed.
    #[test]
    fn products_can_be_described() {
        let library = match find() {
            Ok(library) => library,
            Err(error) => return println!("skipped: {error}"),
        };
        println!("{}", library.describe());
        assert_eq!(library.name_of(NOT_SUPPORTED), "CUBLAS_STATUS_NOT_SUPPORTED");
        let product = Product { num_tokens: 100, inner: 64, out: 32, y_type: CUDA_R_16BF };
        assert!(Described::new(&library, &product).is_ok());
    }
}
