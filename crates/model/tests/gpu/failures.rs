//! What goes wrong on a GPU, each in one sentence.

use anabranch_model::{Batch, Config, Cuda, Error, Model, Segment};

use crate::support::{load, on_gpu};

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_gpu_that_does_not_exist() {
    on_gpu(|_| {
        let text = Cuda::open(1000).unwrap_err().to_string();
        assert!(text.contains("GPU 1000 was asked for, and there ") && !text.contains('\n'), "{text}");
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_cache_that_does_not_fit() {
    on_gpu(|gpu| {
        let model = load("qwen3-moe", gpu());
        let most = model.config().max_position_embeddings;
        let sequences = (1_usize << 33) / most;
        let error = model.cache(&vec![most; sequences]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::GpuMemory { .. }), "{text}");
        assert!(text.starts_with(&format!("a cache of {} tokens needs ", sequences * most)), "{text}");
        assert!(text.contains(" is free: about ") && text.ends_with(" tokens would fit"), "{text}");
        // The GPU is as good as before.
        assert!(model.cache(&[most]).is_ok());
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn weights_that_do_not_fit() {
    on_gpu(|gpu| {
        let config = Config::preset("deepseek-v3").unwrap().unwrap();
        let error = Model::random(config, 0, gpu(), &mut |_, _| {}).err().unwrap();
        let text = error.to_string();
        assert!(matches!(error, Error::GpuMemory { .. }), "{text}");
        assert!(text.starts_with("a model of 671.0 billion parameters needs 12"), "{text}");
        assert!(text.ends_with(" billion would fit in bf16"), "{text}");
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn segments_that_do_not_fit_their_slots() {
    on_gpu(|gpu| {
        let model = load("llama", gpu());
        let mut cache = model.cache(&[4, 4]).unwrap();
        let mut run = |segments: &[Segment]| {
            let tokens = segments.iter().map(|segment| segment.len).sum();
            let ids = vec![1; tokens];
            model.forward(&Batch { ids: &ids, segments }, &mut cache, None).map(drop)
        };
        let segment = |sequence, position, len| Segment { sequence, position, len };
        run(&[segment(0, 0, 3)]).unwrap();
        for (segments, problem) in [
            (vec![segment(0, 4, 1)], "do not continue the 3 that its slot of 4 holds"),
            (vec![segment(0, 3, 2)], "do not continue the 3 that its slot of 4 holds"),
            (vec![segment(2, 0, 1)], "sequence 2 has no slot in a cache of 2"),
            (vec![segment(1, 0, 1), segment(1, 1, 1)], "sequence 1 has two segments"),
        ] {
            let text = run(&segments).unwrap_err().to_string();
            assert!(text.contains(problem), "{text}");
        }
        run(&[]).unwrap();
        run(&[segment(0, 3, 1), segment(1, 0, 4)]).unwrap();
    });
}
