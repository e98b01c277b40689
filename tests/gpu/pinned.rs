//! Page-locked host memory and copies from it.

use anabranch::{
    Error,
    cuda::{Device, Pinned, Stream},
};
use half::bf16;

use crate::{
    numbers::{bits, normals},
    support::{Guarded, Noise, on_gpu},
};

const POISON: bf16 = bf16::from_f32_const(-77.0);

/// Pieces of `values` through the buffers in turn, each refilled as soon as it may be.
fn send(stream: &Stream, buffers: &mut [Pinned<bf16>], values: &[bf16], piece: usize) -> Vec<bf16> {
    let mut out = stream.upload([values.len()], &vec![POISON; values.len()]).unwrap();
    for (index, values) in values.chunks(piece).enumerate() {
        let buffer = &mut buffers[index % 3];
        buffer.as_mut_slice().unwrap()[..values.len()].copy_from_slice(values);
        stream.upload_pinned_into(buffer, &mut out.part_mut(index * piece, [values.len()]).unwrap()).unwrap();
    }
    stream.download(&out.view()).unwrap()
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn pinned_buffers_are_refilled_after_their_copies() {
    on_gpu(|stream| {
        // 8 MiB: a copy takes longer than the host needs to come back to its buffer.
        let most = 4 << 20;
        let mut buffers: Vec<Pinned<bf16>> = (0..3).map(|_| stream.pinned(most).unwrap()).collect();
        let values = normals(&mut Noise(1), 10 * most / 4 + 77);
        for piece in [most, most / 4 + 1, most / 7, 65_537] {
            assert!(bits(&send(stream, &mut buffers, &values, piece)) == bits(&values), "pieces of {piece}");
        }
        for len in [0, 1, 2, 3, 255, 4097] {
            assert_eq!(bits(&send(stream, &mut buffers, &values[..len], 1000)), bits(&values[..len]));
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn pinned_memory_begins_as_zeros_and_is_copied_to_its_place_only() {
    on_gpu(|stream| {
        let mut host = stream.pinned::<bf16>(1001).unwrap();
        assert!(host.len() == 1001 && host.as_mut_slice().unwrap().iter().all(|value| value.to_bits() == 0));
        let values = normals(&mut Noise(2), 1001);
        host.as_mut_slice().unwrap().copy_from_slice(&values);
        // The same values twice, and less than all, at an address that nothing is aligned to.
        for len in [1001, 333, 0] {
            let mut out = Guarded::new(stream, [len], POISON, 3);
            stream.upload_pinned_into(&mut host, &mut out.view_mut()).unwrap();
            assert_eq!(bits(&out.read(stream)), bits(&values[..len]));
        }
        assert_eq!(stream.pinned::<u8>(0).unwrap().len(), 1);
    });
}

/// One buffer, two streams: what comes back to the host is free of both copies.
#[test]
#[ignore = "needs a CUDA GPU"]
fn pinned_memory_is_shared_by_streams() {
    on_gpu(|stream| {
        let other = stream.device().new_stream().unwrap();
        let len = 4 << 20;
        let mut host = stream.pinned::<u32>(len).unwrap();
        let mut outs = [stream.zeros::<u32>([len]).unwrap(), other.zeros::<u32>([len]).unwrap()];
        for round in 1..20 {
            host.as_mut_slice().unwrap().fill(round);
            for (out, stream) in outs.iter_mut().zip([stream, &other]) {
                stream.upload_pinned_into(&mut host, &mut out.view_mut()).unwrap();
            }
            host.as_mut_slice().unwrap().fill(0);
            for (out, stream) in outs.iter().zip([stream, &other]) {
                assert!(stream.download(&out.view()).unwrap().iter().all(|value| *value == round), "round {round}");
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn pinned_uploads_that_cannot_be_are_refused() {
    on_gpu(|stream| {
        let mut host = stream.pinned::<bf16>(8).unwrap();
        let mut out = stream.zeros::<bf16>([3, 3]).unwrap();
        let refused = stream.upload_pinned_into(&mut host, &mut out.view_mut()).unwrap_err();
        assert_eq!(refused.to_string(), "upload: host must be at least 9 long, got 8");
        let other = Device::open(0).unwrap().new_stream().unwrap();
        let mut out = other.zeros::<bf16>([8]).unwrap();
        let refused = stream.upload_pinned_into(&mut host, &mut out.view_mut()).unwrap_err();
        assert_eq!(refused.to_string(), "upload: out was made on another stream than the operation runs on");
        let refused = stream.pinned::<u64>(usize::MAX / 2).unwrap_err();
        assert!(matches!(refused, Error::OutOfHostMemory { .. }), "{refused}");
        let mut out = stream.zeros::<bf16>([8]).unwrap();
        stream.upload_pinned_into(&mut host, &mut out.view_mut()).unwrap();
    });
}
