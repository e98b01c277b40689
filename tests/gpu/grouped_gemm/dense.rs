//! linear: the product with one expert that has every row, and the kernel for a few tokens.

use anabranch::cuda::{Epilogue, LinearInput, Stream, Tile, linear, linear_into};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use super::{
    Output,
    cases::{BF16, F32, any_epilogue, close, floats, noise, product},
    tiles,
};
use crate::support::{Guarded, on_gpu, runner};

#[derive(Debug, Clone, Copy)]
pub(super) struct Dense {
    pub(super) num_tokens: usize,
    pub(super) inner: usize,
    pub(super) out: usize,
    pub(super) epilogue: Epilogue,
    pub(super) bias: bool,
    pub(super) seed: u64,
}

pub(super) fn multiply<O: Output>(
    stream: &Stream,
    dense: &Dense,
    x: &[bf16],
    weight: &[bf16],
    bias: Option<&[f32]>,
    tile: Tile,
) -> Vec<O> {
    let Dense { num_tokens, inner, out, epilogue, .. } = *dense;
    let poison = bf16::from_f32(3.0e38);
    let x = Guarded::holding(stream, [num_tokens, inner], x, poison, 0);
    let weight = Guarded::holding(stream, [weight.len() / inner, inner], weight, poison, 0);
    let bias = bias.map(|bias| Guarded::holding(stream, [bias.len()], bias, 3.0e38, 0));
    let mut y = Guarded::new(stream, [num_tokens, out], O::poison(), 0);
    let bias = bias.as_ref().map(Guarded::view);
    let input = LinearInput { x: x.view(), weight: weight.view(), bias, epilogue, tile };
    linear_into(stream, &input, &mut y.view_mut()).unwrap();
    y.read(stream)
}

fn check<O: Output>(stream: &Stream, dense: &Dense) -> Result<(), String> {
    let Dense { num_tokens, inner, out, epilogue, bias, seed } = *dense;
    let x = noise(num_tokens * inner, 1.0, seed);
    let stacked = if epilogue == Epilogue::SwiGlu { 2 } else { 1 };
    let weight = noise(stacked * out * inner, 3.0 / (inner as f32).sqrt(), seed ^ 1);
    let bias = bias.then(|| floats(&noise(stacked * out, 1.0, seed ^ 2)));
    let y: Vec<O> = multiply(stream, dense, &x, &weight, bias.as_deref(), Tile::Auto);
    let other = tiles(stream)[seed as usize % tiles(stream).len()];
    // A few tokens have a kernel of their own, which sums in another order.
    let gated = epilogue == Epilogue::SwiGlu && bias.is_none();
    let most = match stream.device().capability() {
        (9, 0) => MOST_OF_HOPPER,
        _ if stacked * out * inner < 1 << 24 => MOST,
        _ => FEW,
    };
    let few = num_tokens <= most && (gated || epilogue == Epilogue::Linear);
    let tile = if few { Tile::Auto } else { other };
    if y != multiply(stream, dense, &x, &weight, bias.as_deref(), tile) {
        return Err(format!("the tile that is chosen and {tile:?} give different bits"));
    }
    let expected = product(&floats(&x), [inner, out], &weight, bias.as_deref(), epilogue);
    let near = |y: Vec<O>| {
        let y: Vec<f32> = y.into_iter().map(Into::into).collect();
        close(&y, &expected, out, if size_of::<O>() == 4 { F32 } else { BF16 })
    };
    near(y)?;
    if few { near(multiply(stream, dense, &x, &weight, bias.as_deref(), other)) } else { Ok(()) }
}

/// Most tokens of the kernel for a few: of a large weight, and of one below 32 MiB.
const FEW: usize = 4;
const MOST: usize = 8;
/// Of any weight, where tokens lie side by side in an instruction.
const MOST_OF_HOPPER: usize = 64;

/// Every number of tokens that it takes and one more, on rows of less than a step, of many, and as wide as a vocabulary.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_few_tokens() {
    on_gpu(|stream| {
        for num_tokens in 0..=MOST + 1 {
            // Weights of 32 MiB and more, whose values take their time, where the choice changes.
            let large: &[(usize, usize)] =
                if [1, FEW, FEW + 1].contains(&num_tokens) { &[(2048, 8192), (64, 102_400)] } else { &[] };
            for &(inner, out) in [(8, 8), (264, 1048), (4104, 200), (14_336, 16)].iter().chain(large) {
                for (epilogue, bias) in [(Epilogue::Linear, true), (Epilogue::Linear, false), (Epilogue::SwiGlu, false)]
                {
                    let dense = Dense { num_tokens, inner, out, epilogue, bias, seed: (inner + num_tokens) as u64 };
                    check::<bf16>(stream, &dense).unwrap();
                    check::<f32>(stream, &dense).unwrap();
                }
            }
        }
    });
}

/// As many as there are instructions for, one more, and less; weights whose columns one block has, several share, and that end within
/// a tile, a step or both.
#[test]
#[ignore = "needs a CUDA GPU"]
fn tokens_side_by_side() {
    on_gpu(|stream| {
        for num_tokens in [5, 8, 9, 16, 17, 32, 33, 63, 64, 65] {
            for (inner, out) in [(2048, 1536), (648, 4104), (64, 56_000), (5000, 72), (136, 128)] {
                for (epilogue, bias) in [(Epilogue::Linear, true), (Epilogue::Linear, false), (Epilogue::SwiGlu, false)]
                {
                    let out = if epilogue == Epilogue::SwiGlu { out / 16 * 8 } else { out };
                    let dense = Dense { num_tokens, inner, out, epilogue, bias, seed: (inner + num_tokens) as u64 };
                    check::<bf16>(stream, &dense).unwrap();
                    check::<f32>(stream, &dense).unwrap();
                }
            }
        }
    });
}

/// A block that has a tile's whole depth goes around its ring many times, as with an LM head.
#[test]
#[ignore = "needs a CUDA GPU"]
fn long_rows_of_many_columns() {
    on_gpu(|stream| {
        for num_tokens in [5, 33] {
            let (inner, out, epilogue) = (2048, 56_000, Epilogue::Linear);
            check::<f32>(stream, &Dense { num_tokens, inner, out, epilogue, bias: false, seed: 9 }).unwrap();
        }
    });
}

/// Weights that are read before the launch before has ended, where that one makes x: the same bits as when they wait.
#[test]
#[ignore = "needs a CUDA GPU"]
fn settled_weights_change_no_bits() {
    on_gpu(|stream| {
        let (inner, between, out) = (1024, 2048, 1536);
        for num_tokens in [1, 5, 20, 64] {
            let x = stream.upload([num_tokens, inner], &noise(num_tokens * inner, 1.0, 1)).unwrap();
            let first = stream.upload([between, inner], &noise(between * inner, 0.1, 2)).unwrap();
            let second = stream.upload([out, between], &noise(out * between, 0.1, 3)).unwrap();
            let product = |stream: &Stream| {
                let mut h = stream.zeros::<bf16>([num_tokens, between]).unwrap();
                let mut y = stream.zeros::<f32>([num_tokens, out]).unwrap();
                let (epilogue, tile) = (Epilogue::Linear, Tile::Auto);
                let input = LinearInput { x: x.view(), weight: first.view(), bias: None, epilogue, tile };
                linear_into(stream, &input, &mut h.view_mut()).unwrap();
                let input = LinearInput { x: h.view(), weight: second.view(), ..input };
                linear_into(stream, &input, &mut y.view_mut()).unwrap();
                stream.download(&y.view()).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let waiting = product(stream);
            stream.synchronize().unwrap();
            let settled = stream.clone().with_settled_weights();
            for _ in 0..8 {
                assert_eq!(product(&settled), waiting, "{num_tokens} tokens");
            }
        }
    });
}

/// Of x, what is not a number stays in its own row of y; of the weights, in its own column.
#[test]
#[ignore = "needs a CUDA GPU"]
fn nan_stays_where_it_is() {
    on_gpu(|stream| {
        for tokens in [3, 20] {
            let (inner, out) = (264, 72);
            let dense = Dense { num_tokens: tokens, inner, out, epilogue: Epilogue::Linear, bias: false, seed: 7 };
            let (mut x, mut weight) = (noise(tokens * inner, 1.0, 1), noise(out * inner, 0.1, 2));
            let clean: Vec<f32> = multiply(stream, &dense, &x, &weight, None, Tile::Auto);
            x[inner + 100] = bf16::NAN;
            weight[5 * inner + 17] = bf16::INFINITY;
            let dirty: Vec<f32> = multiply(stream, &dense, &x, &weight, None, Tile::Auto);
            for (at, (clean, dirty)) in clean.iter().zip(&dirty).enumerate() {
                if at / out == 1 || at % out == 5 {
                    assert!(!dirty.is_finite(), "element {at}");
                } else {
                    assert_eq!(clean.to_bits(), dirty.to_bits(), "element {at}");
                }
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference_over_all_shapes() {
    on_gpu(|stream| {
        let shapes = (0..300_usize, 1..=70_usize, 1..=70_usize, any_epilogue(), any::<[bool; 2]>(), any::<u64>());
        let tried = |(num_tokens, inner, out, epilogue, [bias, wide], seed): (_, usize, usize, _, [bool; 2], _)| {
            let dense = Dense { num_tokens, inner: 8 * inner, out: 8 * out, epilogue, bias, seed };
            let checked = if wide { check::<f32>(stream, &dense) } else { check::<bf16>(stream, &dense) };
            checked.map_err(TestCaseError::fail)
        };
        runner().run(&shapes, tried).unwrap();
    });
}

/// As wide as a vocabulary, as tall as a prompt.
#[test]
#[ignore = "needs a CUDA GPU"]
fn many_rows_and_many_columns() {
    on_gpu(|stream| {
        let dense = Dense { num_tokens: 4100, inner: 40, out: 264, epilogue: Epilogue::Linear, bias: true, seed: 1 };
        check::<bf16>(stream, &dense).unwrap();
        check::<f32>(stream, &Dense { num_tokens: 3, inner: 64, out: 151_936, ..dense }).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn allocating_form_agrees() {
    on_gpu(|stream| {
        let dense = Dense { num_tokens: 5, inner: 72, out: 24, epilogue: Epilogue::Gelu, bias: false, seed: 2 };
        let (x, weight) = (noise(5 * 72, 1.0, 3), noise(24 * 72, 0.5, 4));
        let expected: Vec<f32> = multiply(stream, &dense, &x, &weight, None, Tile::Auto);
        let (x, weight) = (stream.upload([5, 72], &x).unwrap(), stream.upload([24, 72], &weight).unwrap());
        let input =
            LinearInput { x: x.view(), weight: weight.view(), bias: None, epilogue: Epilogue::Gelu, tile: Tile::Auto };
        let y = linear::<f32>(stream, &input).unwrap();
        assert_eq!(stream.download(&y.view()).unwrap(), expected);
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let (x, weight) = (stream.zeros::<bf16>([3, 24]).unwrap(), stream.zeros::<bf16>([16, 16]).unwrap());
        let input = LinearInput {
            x: x.view(),
            weight: weight.view(),
            bias: None,
            epilogue: Epilogue::Linear,
            tile: Tile::Auto,
        };
        let error = linear::<bf16>(stream, &input).unwrap_err().to_string();
        assert_eq!(error, "linear: weight must be [16, 24], got [16, 16]");
    });
}
