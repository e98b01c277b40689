//! embedding and add.

use anabranch::cuda::{Stream, add_into, embedding, embedding_into};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use crate::{
    numbers::{bits, capture, normals},
    support::{Guarded, Noise, on_gpu, runner},
};

const POISON: bf16 = bf16::from_f32_const(-77.0);

/// Every element is copied: what the reference does, bit by bit.
fn expected(table: &[bf16], ids: &[u32], vocab: usize, width: usize) -> Vec<u16> {
    let row = |id: &u32| match *id as usize {
        id if id < vocab => bits(&table[id * width..][..width]),
        _ => vec![0x7fff; width],
    };
    ids.iter().flat_map(row).collect()
}

fn check_embedding(stream: &Stream, tokens: usize, vocab: usize, width: usize, seed: u64) -> Result<(), String> {
    let mut noise = Noise(seed);
    let table = normals(&mut noise, vocab * width);
    let id = |noise: &mut Noise| match noise.bits() % 20 {
        0 => vocab as u32,
        1 => u32::MAX,
        _ => (noise.bits() % vocab.max(1) as u64) as u32,
    };
    let ids: Vec<u32> = (0..tokens).map(|_| id(&mut noise)).collect();
    let table_device = Guarded::holding(stream, [vocab, width], &table, POISON, 0);
    let ids_device = Guarded::holding(stream, [tokens], &ids, 0, 1);
    let run = || {
        let mut out = Guarded::new(stream, [tokens, width], POISON, 0);
        embedding_into(stream, &table_device.view(), &ids_device.view(), &mut out.view_mut()).unwrap();
        bits(&out.read(stream))
    };
    let out = run();
    if out != run() {
        return Err("the same call twice gave different bits".to_owned());
    }
    if out == expected(&table, &ids, vocab, width) { Ok(()) } else { Err("a row is not its id's".to_owned()) }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn embedding_copies_rows_and_marks_unknown_ids() {
    on_gpu(|stream| {
        let width = prop_oneof![4 => 1..40_usize, 1 => prop::sample::select(vec![255, 256, 257, 512, 896])];
        let strategy = (0..200_usize, 0..100_usize, width, any::<u64>());
        let tried = |(tokens, vocab, eighths, seed)| {
            check_embedding(stream, tokens, vocab, 8 * eighths, seed).map_err(TestCaseError::fail)
        };
        runner().run(&strategy, tried).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn embedding_is_captured_in_a_graph_and_replayed_with_other_ids() {
    on_gpu(|stream| {
        let table = normals(&mut Noise(1), 50 * 64);
        let table_device = stream.upload([50, 64], &table).unwrap();
        let mut ids = Guarded::new(stream, [3], 0_u32, 0);
        let mut out = Guarded::new(stream, [3, 64], POISON, 0);
        let graph = capture(stream, || {
            embedding_into(stream, &table_device.view(), &ids.view(), &mut out.view_mut()).unwrap();
        });
        for values in [[1, 2, 3], [49, 50, 0]] {
            ids.fill(stream, &values);
            graph.launch().unwrap();
            assert_eq!(bits(&out.read(stream)), expected(&table, &values, 50, 64));
        }
    });
}

fn check_add(stream: &Stream, len: usize, offsets: [usize; 2], seed: u64) -> Result<(), String> {
    let mut noise = Noise(seed);
    let (mut x, y) = (normals(&mut noise, len), normals(&mut noise, len));
    if let Some(value) = x.first_mut() {
        *value = bf16::INFINITY;
    }
    let y_device = Guarded::holding(stream, [len], &y, POISON, offsets[1]);
    let run = || {
        let mut out = Guarded::holding(stream, [len], &x, POISON, offsets[0]);
        add_into(stream, &mut out.view_mut(), &y_device.view()).unwrap();
        bits(&out.read(stream))
    };
    let sums: Vec<bf16> = x.iter().zip(&y).map(|(x, y)| bf16::from_f32(x.to_f32() + y.to_f32())).collect();
    let out = run();
    if out != run() {
        return Err("the same call twice gave different bits".to_owned());
    }
    if out == bits(&sums) { Ok(()) } else { Err("a sum is not the rounded one".to_owned()) }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn add_rounds_once_at_any_length_and_alignment() {
    on_gpu(|stream| {
        // A block adds 8,192 elements.
        let len = prop_oneof![0..300_usize, 8000..8500_usize, 16_300..16_500_usize];
        let offset = || prop_oneof![2 => Just(0_usize), 1 => 0..9_usize];
        let tried = |(len, a, b, seed)| check_add(stream, len, [a, b], seed).map_err(TestCaseError::fail);
        runner().run(&(len, offset(), offset(), any::<u64>()), tried).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn add_is_captured_in_a_graph() {
    on_gpu(|stream| {
        let ones = vec![bf16::ONE; 1000];
        let mut x = Guarded::holding(stream, [1000], &ones, POISON, 0);
        let y = stream.upload([1000], &ones).unwrap();
        let graph = capture(stream, || add_into(stream, &mut x.view_mut(), &y.view()).unwrap());
        // Once before the capture, and then each replay.
        for count in 3..6_u8 {
            graph.launch().unwrap();
            assert!(x.read(stream).iter().all(|value| value.to_f32() == f32::from(count)));
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let table = stream.zeros::<bf16>([4, 12]).unwrap();
        let ids = stream.zeros::<u32>([2]).unwrap();
        assert_eq!(
            embedding(stream, &table.view(), &ids.view()).unwrap_err().to_string(),
            "embedding: the kernel was not launched: a size or setting is out of range or contradicts another"
        );
        let table = stream.zeros::<bf16>([4, 16]).unwrap();
        let mut out = stream.zeros::<bf16>([3, 16]).unwrap();
        assert_eq!(
            embedding_into(stream, &table.view(), &ids.view(), &mut out.view_mut()).unwrap_err().to_string(),
            "embedding: out must be [2, 16], got [3, 16]"
        );
        assert_eq!(
            add_into(stream, &mut out.view_mut(), &table.view()).unwrap_err().to_string(),
            "add: y must be [3, 16], got [4, 16]"
        );
    });
}
