//! The GPU's memory: what a pass takes of it, and a large model.

use anabranch_model::{BLOCK_SIZE, Batch, Config, Forward, Model, Segment, Session};

use crate::support::{Expected, golden, load, on_gpu};

/// Decoding runs from buffers that are there: after the first step of its size nothing is allocated.
#[test]
#[ignore = "needs a CUDA GPU"]
fn decode_steps_allocate_nothing() {
    on_gpu(|gpu| {
        for name in &golden() {
            let (model, expected) = (load(name, gpu()), Expected::open(name));
            let ids = expected.tokens("input_ids");
            let mut session = Session::new(&model).unwrap();
            let tables = [[0, 1], [2, 3]];
            session.reset(4).unwrap();
            let segments = |position, len| [&tables[0][..], &tables[1]].map(|blocks| Segment { blocks, position, len });
            session.forward(&Batch { ids: &ids, segments: &segments(0, ids.len() / 2) }).unwrap();
            let mut counts = Vec::new();
            // Past the end of a block.
            for position in ids.len() / 2..BLOCK_SIZE + 4 {
                let segments = segments(position, 1);
                session.forward(&Batch { ids: &[3, 5], segments: &segments }).unwrap();
                counts.push(model.backend().usage().allocations);
            }
            assert!(counts.iter().all(|count| *count == counts[0]), "{name}: allocations after each step {counts:?}");
        }
    });
}

/// A published model of 16 billion parameters, made on the GPU: no more is taken than weights, cache and workspace.
#[test]
#[ignore = "needs a CUDA GPU"]
fn peak_of_a_large_model() {
    on_gpu(|gpu| {
        let gpu = gpu();
        let device = gpu.stream().device().clone();
        let config = Config::preset("deepseek-moe-16b").unwrap().unwrap();
        let (free, _) = device.memory().unwrap();
        if free < 40 << 30 {
            println!("skipped: 40 GiB of GPU memory are needed, {} are free", free >> 30);
            return;
        }
        let model = Model::random(config, 0, gpu, &mut |_, _| {}).unwrap();
        let mut session = Session::new(&model).unwrap();
        let blocks: Vec<u32> = (0..32).collect();
        session.reset(blocks.len()).unwrap();
        let ids: Vec<u32> = (1000..1512).collect();
        let prompt = [Segment { blocks: &blocks, position: 0, len: ids.len() }];
        let logits = session.forward(&Batch { ids: &ids, segments: &prompt }).unwrap();
        assert!(logits.iter().all(|logit| logit.is_finite()));
        assert!(logits.iter().any(|logit| *logit != 0.0));
        for position in 512..520 {
            let next = [Segment { blocks: &blocks, position, len: 1 }];
            session.forward(&Batch { ids: &[7], segments: &next }).unwrap();
        }
        let usage = model.backend().usage();
        let stated = usage.weights + usage.cache + usage.workspace;
        let Some(peak) = device.peak_memory().unwrap() else { return };
        println!("peak {peak} bytes, stated {stated}: {usage:?}");
        assert!(peak as f64 <= 1.05 * stated as f64, "{peak} bytes were taken, {stated} are stated");
    });
}
