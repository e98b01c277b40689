//! `random` and `checksum`: both exact.

use anabranch::{
    cuda::{Stream, checksum, checksum_into, random, random_into},
    reference,
};
use half::bf16;

use crate::{
    numbers::{bits, capture},
    support::{Guarded, Noise, on_gpu},
};

const COUNTS: [usize; 9] = [0, 1, 7, 8, 9, 2047, 2048, 2049, 100_003];

fn expected(seed: u64, count: usize, scale: f32) -> Vec<f32> {
    (0..count as u64).map(|index| reference::random(seed, index, scale)).collect()
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn noise_is_the_references_to_the_bit() {
    on_gpu(|stream| {
        for (seed, count) in COUNTS.into_iter().enumerate() {
            let seed = seed as u64 * 0x1234_5678_9abc_def1;
            let scale = 0.0221;
            let expected = expected(seed, count, scale);
            let mut wide = Guarded::new(stream, [count], -77.0_f32, 0);
            random_into(stream, seed, scale, &mut wide.view_mut()).unwrap();
            assert_eq!(wide.read(stream), expected);
            let mut narrow = Guarded::new(stream, [count], bf16::from_f32(-77.0), 0);
            random_into(stream, seed, scale, &mut narrow.view_mut()).unwrap();
            let rounded: Vec<bf16> = expected.into_iter().map(bf16::from_f32).collect();
            assert_eq!(bits(&narrow.read(stream)), bits(&rounded));
        }
        let own = random::<f32>(stream, [3, 5], 9, 1.0).unwrap();
        assert_eq!(own.shape().sizes(), [3, 5]);
        assert_eq!(stream.download(&own.view()).unwrap(), expected(9, 15, 1.0));
    });
}

/// The last elements of an array beyond 2^32 bytes.
#[test]
#[ignore = "needs a CUDA GPU"]
fn places_are_counted_in_64_bits() {
    on_gpu(|stream| {
        let count = (1_usize << 31) + 40;
        let all = random::<bf16>(stream, [count], 3, 1.0).unwrap();
        let last = stream.cudarc().clone_dtoh(&all.view().cudarc().slice(count - 64..)).unwrap();
        let expected: Vec<bf16> =
            (count - 64..count).map(|index| bf16::from_f32(reference::random(3, index as u64, 1.0))).collect();
        assert_eq!(bits(&last), bits(&expected));
    });
}

fn words(count: usize) -> Vec<u32> {
    let mut noise = Noise(4);
    (0..count).map(|_| noise.bits() as u32).collect()
}

fn sum_of(stream: &Stream, words: &[u32]) -> u32 {
    let x = stream.upload([words.len()], words).unwrap();
    stream.download(&checksum(stream, &x.view()).unwrap().view()).unwrap()[0]
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn checksums_are_the_references() {
    on_gpu(|stream| {
        for count in COUNTS.into_iter().chain([2, 3, 4, 5, 9_000_001]) {
            let words = words(count);
            assert_eq!(sum_of(stream, &words), reference::checksum(&words), "{count} words");
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_checksum_is_captured_in_a_graph() {
    on_gpu(|stream| {
        let words = words(10_000);
        let x = stream.upload([words.len()], &words).unwrap();
        let mut out = Guarded::new(stream, [1], 0xdead_beef_u32, 0);
        let graph = capture(stream, || checksum_into(stream, &x.view(), &mut out.view_mut()).unwrap());
        for _ in 0..3 {
            graph.launch().unwrap();
        }
        assert_eq!(out.read(stream), [reference::checksum(&words)]);
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let mut out = Guarded::new(stream, [16], bf16::ZERO, 3);
        assert_eq!(
            random_into(stream, 1, 1.0, &mut out.view_mut()).unwrap_err().to_string(),
            "random: the kernel was not launched: a pointer is not aligned"
        );
        let x = stream.zeros::<u32>([4]).unwrap();
        let mut out = stream.zeros::<u32>([2]).unwrap();
        assert_eq!(
            checksum_into(stream, &x.view(), &mut out.view_mut()).unwrap_err().to_string(),
            "checksum: out must be [1], got [2]"
        );
    });
}
