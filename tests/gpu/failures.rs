//! What goes wrong on a GPU, each in one sentence that names who is at fault.

use std::{env, mem, process::Command};

use anabranch::{
    Error,
    cuda::{Device, Stream, View, add_into, rms_norm},
};
use half::bf16;

use crate::support::on_gpu;

/// Set in the process that is to lose its GPU.
const CHILD: &str = "ANABRANCH_LOSES_ITS_GPU";

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_gpu_that_does_not_exist() {
    on_gpu(|_| {
        let count = Device::count().unwrap();
        let text = Device::open(count).unwrap_err().to_string();
        let expected = format!("no usable CUDA GPU: GPU {count} was asked for, and there are {count}, from 0");
        assert_eq!(text, expected);
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn memory_that_is_not_there() {
    on_gpu(|stream| {
        let (_, total) = stream.device().memory().unwrap();
        let error = stream.zeros::<u8>([2 * total]).unwrap_err();
        let Error::OutOfMemory { asked, free, .. } = error else { panic!("{error}") };
        assert_eq!(asked, 2 * total);
        assert!(free <= total);
        // The GPU is as good as before.
        stream.zeros::<u8>([1 << 20]).unwrap();
    });
}

/// An error that a kernel meets while it runs comes up in the calls that follow: it is told as the kernel's, not as theirs. A
/// process that met one has lost its GPU, so that another process does it.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_kernel_that_fails() {
    on_gpu(|stream| {
        if env::var_os(CHILD).is_some() {
            lose(stream);
            // Nothing can be freed any more.
            std::process::exit(0);
        }
        let test = ["failures::a_kernel_that_fails", "--exact", "--include-ignored", "--nocapture"];
        let child = Command::new(env::current_exe().unwrap()).args(test).env(CHILD, "1").output().unwrap();
        let text = String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success(), "{text}");
    });
}

fn lose(stream: &Stream) {
    let shape = [4, 64];
    let mut x = stream.zeros::<bf16>(shape).unwrap();
    let weight = stream.zeros::<f32>([64]).unwrap();
    // SAFETY: nothing on the host follows the pointer, and the slice is never dropped. The kernel that follows it fails, as this test
    // wants.
    let nowhere = unsafe { stream.cudarc().upgrade_device_ptr::<bf16>(1 << 50, 256) };
    let y = View::new(nowhere.slice(..), shape).unwrap();
    add_into(stream, &mut x.view_mut(), &y).unwrap();
    let error = stream.synchronize().unwrap_err();
    let Error::Earlier { operation: "synchronize", launched, .. } = &error else { panic!("{error}") };
    assert_eq!(launched, &["add"]);
    let text = error.to_string();
    assert!(text.starts_with("a kernel failed on the GPU: ") && text.contains("newest first, is add;"), "{text}");
    // Whatever is asked for next fails for the same reason, and does not take the blame.
    let error = rms_norm(stream, &x.view(), &weight.view(), 1e-6).unwrap_err();
    let Error::Earlier { launched, .. } = &error else { panic!("{error}") };
    assert_eq!(launched, &["add"]);
    mem::forget(nowhere);
}
