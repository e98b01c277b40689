//! linear where cuBLASLt is installed: beside the reference, and beside the kernels' own.

use anabranch::{
    Error,
    cuda::{Epilogue, LinearInput, Stream, Tile, linear_into},
};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use super::{
    Output,
    cases::{BF16, F32, close, floats, noise, product},
    dense::{Dense, multiply},
};
use crate::{
    numbers::capture,
    support::{Guarded, on_gpu, runner},
};

/// Runs a test on two streams: without cuBLASLt, and with it from `least_tokens` tokens on. Where it is not installed the test passes
/// with a note.
fn on_both(least_tokens: usize, test: impl FnOnce(&Stream, &Stream)) {
    on_gpu(|plain| {
        let stream = plain.device().new_stream().unwrap();
        match stream.enable_cublaslt(least_tokens) {
            Ok(()) => test(plain, &stream),
            Err(error @ Error::NoCublasLt { .. }) => println!("skipped: {error}"),
            Err(error) => panic!("{error}"),
        }
        stream.synchronize().unwrap();
    });
}

/// A product without bias or epilogue.
fn plain_product(num_tokens: usize, inner: usize, out: usize, seed: u64) -> Dense {
    Dense { num_tokens, inner, out, epilogue: Epilogue::Linear, bias: false, seed }
}

impl Dense {
    /// x and the weight.
    fn operands(&self) -> [Vec<bf16>; 2] {
        let scale = 3.0 / (self.inner as f32).sqrt();
        [noise(self.num_tokens * self.inner, 1.0, self.seed), noise(self.out * self.inner, scale, self.seed ^ 1)]
    }

    fn on<O: Output>(&self, stream: &Stream) -> Vec<O> {
        let [x, weight] = self.operands();
        multiply(stream, self, &x, &weight, None, Tile::Auto)
    }
}

fn check<O: Output>(plain: &Stream, stream: &Stream, dense: &Dense) -> Result<(), String> {
    let [x, weight] = dense.operands();
    let expected = product(&floats(&x), [dense.inner, dense.out], &weight, None, Epilogue::Linear);
    let bound = if size_of::<O>() == 4 { F32 } else { BF16 };
    for (who, stream) in [("own", plain), ("cuBLASLt", stream)] {
        let y: Vec<O> = dense.on(stream);
        if y != dense.on(stream) {
            return Err(format!("{who}: the same call twice gave different bits"));
        }
        let y: Vec<f32> = y.into_iter().map(Into::into).collect();
        close(&y, &expected, dense.out, bound).map_err(|what| format!("{who}: {what}"))?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn both_agree_with_the_reference_over_all_shapes() {
    on_both(1, |plain, stream| {
        let shapes = (0..300_usize, 1..=140_usize, 1..=140_usize, any::<bool>(), any::<u64>());
        let tried = |(num_tokens, inner, out, wide, seed)| {
            let dense = plain_product(num_tokens, 8 * inner, 8 * out, seed);
            let checked = if wide { check::<f32>(plain, stream, &dense) } else { check::<bf16>(plain, stream, &dense) };
            checked.map_err(TestCaseError::fail)
        };
        runner().run(&shapes, tried).unwrap();
    });
}

/// Long sums into few columns, which are split among blocks; and the shapes of a model's projections.
#[test]
#[ignore = "needs a CUDA GPU"]
fn long_sums_and_large_products() {
    on_both(1, |plain, stream| {
        for (tokens, inner, out) in [(64, 16_384, 64), (100, 8192, 72), (257, 4096, 520), (1024, 2048, 4096)] {
            let dense = plain_product(tokens, inner, out, 7);
            check::<bf16>(plain, stream, &dense).unwrap();
            check::<f32>(plain, stream, &dense).unwrap();
        }
        // It is at work: it adds 16,384 products up in another order.
        let dense = plain_product(64, 16_384, 64, 7);
        assert_ne!(dense.on::<f32>(plain), dense.on::<f32>(stream));
    });
}

/// What it does not take is the kernels' own, bit for bit.
#[test]
#[ignore = "needs a CUDA GPU"]
fn the_rest_is_the_kernels_own() {
    on_both(64, |plain, stream| {
        let short = plain_product(63, 2048, 64, 3);
        assert_eq!(short.on::<f32>(plain), short.on::<f32>(stream));
        for (epilogue, bias) in [(Epilogue::Linear, true), (Epilogue::Gelu, false), (Epilogue::SwiGlu, false)] {
            let dense = Dense { epilogue, bias, ..plain_product(128, 2048, 64, 4) };
            let (x, weight) = (noise(128 * 2048, 1.0, 5), noise(2 * 64 * 2048, 0.1, 6));
            let weight = if epilogue == Epilogue::SwiGlu { &weight[..] } else { &weight[..64 * 2048] };
            let bias = bias.then(|| floats(&noise(64, 1.0, 8)));
            let on = |stream| multiply::<f32>(stream, &dense, &x, weight, bias.as_deref(), Tile::Auto);
            assert_eq!(on(plain), on(stream), "{epilogue:?}");
        }
    });
}

/// A row's NaN stays its own.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_nan_stays_in_its_row() {
    on_both(1, |_, stream| {
        let dense = plain_product(130, 512, 136, 9);
        let [mut x, weight] = dense.operands();
        let clean: Vec<bf16> = multiply(stream, &dense, &x, &weight, None, Tile::Auto);
        x[77 * 512 + 3] = bf16::NAN;
        let got: Vec<bf16> = multiply(stream, &dense, &x, &weight, None, Tile::Auto);
        for (row, (got, clean)) in got.chunks_exact(136).zip(clean.chunks_exact(136)).enumerate() {
            assert!(if row == 77 { got.iter().all(|value| value.is_nan()) } else { got == clean }, "row {row}");
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn replays_in_a_graph() {
    on_both(1, |_, stream| {
        // The second is split among blocks: its parts pass through the workspace.
        let sizes = [plain_product(200, 256, 384, 1), plain_product(64, 16_384, 64, 2)];
        let mut calls = sizes.map(|dense| {
            let [x, weight] = dense.operands();
            let x = Guarded::holding(stream, [dense.num_tokens, dense.inner], &x, bf16::ZERO, 0);
            let weight = Guarded::holding(stream, [dense.out, dense.inner], &weight, bf16::ZERO, 0);
            (x, weight, Guarded::new(stream, [dense.num_tokens, dense.out], f32::poison(), 0))
        });
        let graph = capture(stream, || {
            for (x, weight, y) in &mut calls {
                let (epilogue, tile) = (Epilogue::Linear, Tile::Auto);
                let input = LinearInput { x: x.view(), weight: weight.view(), bias: None, epilogue, tile };
                linear_into(stream, &input, &mut y.view_mut()).unwrap();
            }
        });
        for seed in 10..13 {
            for (dense, (x, ..)) in sizes.iter().zip(&mut calls) {
                x.fill(stream, &Dense { seed, ..*dense }.operands()[0]);
            }
            graph.launch().unwrap();
            for (dense, (.., y)) in sizes.iter().zip(&calls) {
                let [_, weight] = dense.operands();
                let [x, _] = Dense { seed, ..*dense }.operands();
                assert_eq!(
                    y.read(stream),
                    multiply::<f32>(stream, dense, &x, &weight, None, Tile::Auto),
                    "seed {seed}"
                );
            }
        }
    });
}

/// Each stream has its own workspace: what runs on two at once gives what it gives alone.
#[test]
#[ignore = "needs a CUDA GPU"]
fn streams_do_not_disturb_each_other() {
    on_both(1, |_, first| {
        let second = first.device().new_stream().unwrap();
        second.enable_cublaslt(1).unwrap();
        assert!(first.cublaslt_workspace() > 0 && first.clone().cublaslt_workspace() == first.cublaslt_workspace());
        let dense = [plain_product(64, 16_384, 64, 1), plain_product(64, 16_384, 64, 2)];
        let alone = dense.map(|dense| dense.on::<f32>(first));
        std::thread::scope(|scope| {
            for ((stream, dense), alone) in [first, &second].into_iter().zip(&dense).zip(&alone) {
                scope.spawn(move || (0..50).for_each(|_| assert_eq!(&dense.on::<f32>(stream), alone)));
            }
        });
    });
}

/// Pointers that are not on 16 bytes are refused as ever.
#[test]
#[ignore = "needs a CUDA GPU"]
fn unaligned_pointers_are_refused() {
    on_both(1, |_, stream| {
        let x = Guarded::new(stream, [64, 64], bf16::ZERO, 1);
        let weight = Guarded::new(stream, [64, 64], bf16::ZERO, 0);
        let mut y = Guarded::new(stream, [64, 64], f32::poison(), 0);
        let (epilogue, tile) = (Epilogue::Linear, Tile::Auto);
        let input = LinearInput { x: x.view(), weight: weight.view(), bias: None, epilogue, tile };
        let error = linear_into(stream, &input, &mut y.view_mut()).unwrap_err();
        assert!(matches!(error, Error::Launch { operation: "linear", .. }), "{error}");
    });
}
