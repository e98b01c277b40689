//! linear after an addition and a norm, in one launch.

use anabranch::{
    Error,
    cuda::{Epilogue, NormLinearInput, Stream, norm_linear_into, norm_linear_takes},
    reference::rms_norm,
};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use super::{
    Output,
    cases::{BF16, close, floats, noise, product},
    dense::Dense,
};
use crate::support::{Guarded, on_gpu, runner};

const EPS: f32 = 1e-5;

struct Values {
    x: Vec<bf16>,
    delta: Option<Vec<bf16>>,
    norm: Vec<f32>,
    weight: Vec<bf16>,
    bias: Option<Vec<f32>>,
}

impl Values {
    fn new(dense: &Dense, delta: bool) -> Self {
        let Dense { num_tokens, inner, out, epilogue, bias, seed } = *dense;
        let stacked = if epilogue == Epilogue::SwiGlu { 2 } else { 1 };
        Self {
            x: noise(num_tokens * inner, 1.0, seed),
            delta: delta.then(|| noise(num_tokens * inner, 2.0, seed ^ 3)),
            norm: floats(&noise(inner, 1.0, seed ^ 4)),
            weight: noise(stacked * out * inner, 3.0 / (inner as f32).sqrt(), seed ^ 1),
            bias: bias.then(|| floats(&noise(stacked * out, 1.0, seed ^ 2))),
        }
    }

    /// x + delta as bf16 has it.
    fn sum(&self) -> Vec<bf16> {
        let Some(delta) = &self.delta else { return self.x.clone() };
        self.x.iter().zip(delta).map(|(x, delta)| bf16::from_f32(x.to_f32() + delta.to_f32())).collect()
    }
}

/// y, and the sum.
fn run<O: Output>(stream: &Stream, dense: &Dense, values: &Values) -> Result<(Vec<O>, Vec<bf16>), Error> {
    let Dense { num_tokens, inner, out, epilogue, .. } = *dense;
    let huge = bf16::from_f32(3.0e38);
    let hold = |values: &[bf16], rows| Guarded::holding(stream, [rows, inner], values, huge, 0);
    let x = hold(&values.x, num_tokens);
    let delta = values.delta.as_ref().map(|delta| hold(delta, num_tokens));
    let norm = Guarded::holding(stream, [inner], &values.norm, 3.0e38, 0);
    let weight = hold(&values.weight, values.weight.len() / inner);
    let bias = values.bias.as_ref().map(|bias| Guarded::holding(stream, [bias.len()], bias, 3.0e38, 0));
    let mut sum = Guarded::new(stream, [num_tokens, inner], bf16::from_f32(-77.0), 0);
    let mut y = Guarded::new(stream, [num_tokens, out], O::poison(), 0);
    let input = NormLinearInput {
        x: x.view(),
        delta: delta.as_ref().map(Guarded::view),
        norm_weight: norm.view(),
        norm_eps: EPS,
        weight: weight.view(),
        bias: bias.as_ref().map(Guarded::view),
        epilogue,
    };
    norm_linear_into(stream, &input, Some(&mut sum.view_mut()), &mut y.view_mut())?;
    Ok((y.read(stream), sum.read(stream)))
}

fn check<O: Output>(stream: &Stream, dense: &Dense, delta: bool) -> Result<(), String> {
    let values = Values::new(dense, delta);
    let (y, sum) = run::<O>(stream, dense, &values).map_err(|error| error.to_string())?;
    if (y.clone(), sum.clone()) != run(stream, dense, &values).map_err(|error| error.to_string())? {
        return Err("the same call twice gave different bits".to_owned());
    }
    if sum != values.sum() {
        return Err("the sum is not x + delta".to_owned());
    }
    let wide: Vec<f64> = sum.iter().map(|value| value.to_f64()).collect();
    let normed = rms_norm(&wide, &values.norm, EPS).unwrap();
    let normed: Vec<f32> = normed.into_iter().map(|value| bf16::from_f64(value).to_f32()).collect();
    let expected = product(&normed, [dense.inner, dense.out], &values.weight, values.bias.as_deref(), dense.epilogue);
    let y: Vec<f32> = y.into_iter().map(Into::into).collect();
    close(&y, &expected, dense.out, BF16)
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference_over_all_shapes() {
    on_gpu(|stream| {
        let shapes = (1..=8_usize, 1..=70_usize, 1..=70_usize, 0..3_u8, any::<[bool; 2]>(), any::<u64>());
        let tried = |(num_tokens, inner, out, kind, [delta, wide], seed): (_, usize, usize, u8, [bool; 2], _)| {
            let (epilogue, bias) =
                [(Epilogue::Linear, false), (Epilogue::Linear, true), (Epilogue::SwiGlu, false)][usize::from(kind)];
            let dense = Dense { num_tokens, inner: 8 * inner, out: 8 * out, epilogue, bias, seed };
            let checked = if wide { check::<f32>(stream, &dense, delta) } else { check::<bf16>(stream, &dense, delta) };
            checked.map_err(TestCaseError::fail)
        };
        runner().run(&shapes, tried).unwrap();
    });
}

/// One vector a thread, several, and rows of many steps.
#[test]
#[ignore = "needs a CUDA GPU"]
fn named_models() {
    on_gpu(|stream| {
        for num_tokens in 0..=8 {
            for (inner, out) in [(2048, 6144), (4096, 512), (7168, 576)] {
                let dense = Dense { num_tokens, inner, out, epilogue: Epilogue::Linear, bias: false, seed: 3 };
                check::<bf16>(stream, &dense, true).unwrap();
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn refuses_what_it_does_not_take() {
    on_gpu(|stream| {
        let takes = |tokens, sizes, epilogue, bias| norm_linear_takes(stream, tokens, sizes, epilogue, bias).unwrap();
        assert!(takes(8, [2048, 2048], Epilogue::Linear, true) && takes(4, [4096, 4096], Epilogue::SwiGlu, false));
        assert!(!takes(5, [4096, 4096], Epilogue::Linear, false));
        let refused = [(9, Epilogue::Linear, false), (1, Epilogue::SwiGlu, true), (1, Epilogue::Gelu, false)];
        for (num_tokens, epilogue, bias) in refused {
            assert!(!takes(num_tokens, [64, 8], epilogue, bias));
            let dense = Dense { num_tokens, inner: 64, out: 8, epilogue, bias, seed: 1 };
            let error = run::<bf16>(stream, &dense, &Values::new(&dense, true)).unwrap_err();
            assert!(matches!(error, Error::Setting { operation: "norm_linear", .. }), "{error}");
        }
    });
}
