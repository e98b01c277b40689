//! What goes wrong on a GPU, each in one sentence.

use anabranch_model::{BLOCK_SIZE, Batch, Config, Cuda, Error, Model, Segment};

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
        let blocks = (1_usize << 33) / BLOCK_SIZE;
        let error = model.cache(blocks).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::GpuMemory { .. }), "{text}");
        assert!(text.starts_with(&format!("a cache of {} tokens needs ", 1_usize << 33)), "{text}");
        assert!(text.contains(" is free: about ") && text.ends_with(" tokens would fit"), "{text}");
        // The GPU is as good as before.
        assert!(model.cache(1).is_ok());
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
fn segments_that_do_not_fit_their_tables() {
    on_gpu(|gpu| {
        let model = load("llama", gpu());
        let mut cache = model.cache(2).unwrap();
        let mut run = |segments: &[Segment<'_>]| {
            let tokens = segments.iter().map(|segment| segment.len).sum();
            let ids = vec![1; tokens];
            model.forward(&Batch { ids: &ids, segments }, &mut cache, None).map(drop)
        };
        let segment = |blocks, position, len| Segment { blocks, position, len };
        run(&[segment(&[0], 0, 3)]).unwrap();
        for (segments, problem) in [
            (vec![segment(&[0], 4, 1)], "tokens 4 to 5 do not continue what its blocks hold"),
            (vec![segment(&[0], 3, 62)], "tokens 3 to 65 do not fit in a table of 64"),
            (vec![segment(&[2], 0, 1)], "block 2 is not one of the cache's 2"),
            (vec![segment(&[1], 0, 1), segment(&[1], 0, 1)], "two segments of one pass write to block 1"),
        ] {
            let text = run(&segments).unwrap_err().to_string();
            assert!(text.contains(problem), "{text}");
        }
        run(&[]).unwrap();
        run(&[segment(&[0, 1], 3, 1)]).unwrap();
        run(&[segment(&[0], 4, 60), segment(&[1], 0, 4)]).unwrap();
    });
}
