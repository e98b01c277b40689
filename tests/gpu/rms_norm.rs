//! RMS norm: of rows, after an addition, of heads in place.

use anabranch::{
    cuda::{Float, HeadRange, Stream, add_rms_norm_into, rms_norm, rms_norm_heads_into, rms_norm_into},
    reference,
};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use crate::{
    numbers::{BF16, bits, capture, close, normals, widen},
    support::{Guarded, Noise, on_gpu, runner},
};

const POISON: bf16 = bf16::from_f32_const(-77.0);

#[derive(Debug, Clone)]
struct Case {
    num_tokens: usize,
    width: usize,
    /// What the rows are multiplied with: small ones make `eps` matter.
    scale: f32,
    eps: f32,
    ugly: bool,
    seed: u64,
}

impl Case {
    fn rows(&self, noise: &mut Noise, width: usize) -> Vec<bf16> {
        let mut rows: Vec<bf16> =
            (0..self.num_tokens * width).map(|_| bf16::from_f32(noise.normal() * self.scale)).collect();
        if self.ugly && !rows.is_empty() {
            let at = noise.bits() as usize % rows.len();
            rows[at] = bf16::NAN;
        }
        rows
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let width = prop_oneof![
        4 => 1..70_usize,
        // Where one way of sharing a row ends and the next begins, and named models' sizes.
        2 => prop::sample::select(vec![128, 129, 255, 256, 257, 512, 513, 640, 896, 1024, 1025, 8192]),
    ];
    let scale = prop::sample::select(vec![1.0_f32, 1e-3, 100.0]);
    let eps = prop::sample::select(vec![1e-6_f32, 1e-5, 0.0]);
    (0..200_usize, width, scale, eps, prop::bool::weighted(0.2), any::<u64>()).prop_map(
        |(num_tokens, eighths, scale, eps, ugly, seed)| {
            let num_tokens = if eighths > 70 { num_tokens % 9 } else { num_tokens };
            Case { num_tokens, width: 8 * eighths, scale, eps, ugly, seed }
        },
    )
}

/// The reference in float64, as far as float32 rounds it.
fn check_rows(got: &[bf16], x: &[f64], weight: &[f32], eps: f32) -> Result<(), String> {
    let expected = reference::rms_norm(x, weight, eps).unwrap();
    // Sums of positive terms: their error grows with the logarithm of the width at most, next to one rounding to bf16.
    close(&widen(got), &expected, |_, value| (BF16 + 1e-5) * value.abs())
}

fn weight_of<W: Float + PartialEq>(stream: &Stream, weight: &[W]) -> Guarded<W> {
    Guarded::holding(stream, [weight.len()], weight, W::default(), 0)
}

fn check_case<W: Float + PartialEq>(stream: &Stream, case: &Case, of: fn(f32) -> (W, f32)) -> Result<(), String> {
    let mut noise = Noise(case.seed);
    let shape = [case.num_tokens, case.width];
    let (weight, exact): (Vec<W>, Vec<f32>) = (0..case.width).map(|_| of(1.0 + 0.3 * noise.normal())).unzip();
    let weight = weight_of(stream, &weight);
    let x = case.rows(&mut noise, case.width);
    let x_device = Guarded::holding(stream, shape, &x, POISON, 0);

    let run = || {
        let mut out = Guarded::new(stream, shape, POISON, 0);
        rms_norm_into(stream, &x_device.view(), &weight.view(), case.eps, &mut out.view_mut()).unwrap();
        out.read(stream)
    };
    let out = run();
    if bits(&out) != bits(&run()) {
        return Err("the same call twice gave different bits".to_owned());
    }
    check_rows(&out, &widen(&x), &exact, case.eps)?;
    if bits(&x_device.read(stream)) != bits(&x) {
        return Err("the norm changed its input".to_owned());
    }

    let delta = normals(&mut noise, x.len());
    let delta_device = Guarded::holding(stream, shape, &delta, POISON, 0);
    let mut residual = Guarded::holding(stream, shape, &x, POISON, 0);
    let mut out = Guarded::new(stream, shape, POISON, 0);
    let (delta_view, weight_view) = (delta_device.view(), weight.view());
    add_rms_norm_into(stream, &mut residual.view_mut(), &delta_view, &weight_view, case.eps, &mut out.view_mut())
        .unwrap();
    let residual = residual.read(stream);
    let sums: Vec<bf16> = x.iter().zip(&delta).map(|(x, delta)| bf16::from_f32(x.to_f32() + delta.to_f32())).collect();
    let same = |(a, b): (&bf16, &bf16)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
    if !residual.iter().zip(&sums).all(same) {
        return Err("the residual is not the rounded sum".to_owned());
    }
    check_rows(&out.read(stream), &widen(&sums), &exact, case.eps)
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference() {
    on_gpu(|stream| {
        let tried = |(case, wide): (Case, bool)| {
            let checked = if wide {
                check_case::<f32>(stream, &case, |weight| (weight, weight))
            } else {
                check_case::<bf16>(stream, &case, |weight| {
                    let weight = bf16::from_f32(weight);
                    (weight, weight.to_f32())
                })
            };
            checked.map_err(TestCaseError::fail)
        };
        runner().run(&(any_case(), any::<bool>()), tried).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn heads_are_normed_in_place_and_nothing_else() {
    on_gpu(|stream| {
        let heads = (0..40_usize, prop::sample::select(vec![8, 64, 72, 96, 128, 256, 512]), 0..3_usize, 0..3_usize);
        let tried = |(case, (num_heads, head_dim, before, after)): (Case, (usize, usize, usize, usize))| {
            let range = HeadRange { column: 8 * before, num_heads: num_heads + 1, head_dim };
            let case = Case { num_tokens: case.num_tokens % 20, ..case };
            check_heads(stream, &case, range, range.column + range.width() + 8 * after).map_err(TestCaseError::fail)
        };
        runner().run(&(any_case(), heads), tried).unwrap();
    });
}

fn check_heads(stream: &Stream, case: &Case, range: HeadRange, columns: usize) -> Result<(), String> {
    let mut noise = Noise(case.seed);
    let weight: Vec<f32> = (0..range.head_dim).map(|_| 1.0 + 0.3 * noise.normal()).collect();
    let x = case.rows(&mut noise, columns);
    let mut x_device = Guarded::holding(stream, [case.num_tokens, columns], &x, POISON, 0);
    let weight_device = weight_of(stream, &weight);
    rms_norm_heads_into(stream, &mut x_device.view_mut(), range, &weight_device.view(), case.eps).unwrap();
    let got = x_device.read(stream);
    let (mut outside, mut inside) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for (at, pair) in got.iter().zip(&x).enumerate() {
        let within = (range.column..range.column + range.width()).contains(&(at % columns));
        let to = if within { &mut inside } else { &mut outside };
        to[0].push(*pair.0);
        to[1].push(*pair.1);
    }
    if bits(&outside[0]) != bits(&outside[1]) {
        return Err("something beside the heads changed".to_owned());
    }
    check_rows(&inside[0], &widen(&inside[1]), &weight, case.eps)
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_in_a_graph_and_a_row_does_not_depend_on_the_others() {
    on_gpu(|stream| {
        let mut noise = Noise(3);
        for width in [128, 2048, 7168] {
            let (first, second) = (normals(&mut noise, 50 * width), normals(&mut noise, 50 * width));
            let weight = weight_of(stream, &normals(&mut noise, width));
            let mut x = Guarded::holding(stream, [50, width], &first, POISON, 0);
            let mut out = Guarded::new(stream, [50, width], POISON, 0);
            let graph = capture(stream, || {
                rms_norm_into(stream, &x.view(), &weight.view(), 1e-6, &mut out.view_mut()).unwrap();
            });
            for values in [&first, &second, &first] {
                x.fill(stream, values);
                graph.launch().unwrap();
                let replayed = bits(&out.read(stream));
                // The last row alone.
                let last = stream.upload([1, width], &values[49 * width..]).unwrap();
                let alone = rms_norm(stream, &last.view(), &weight.view(), 1e-6).unwrap();
                assert!(bits(&stream.download(&alone.view()).unwrap()) == replayed[49 * width..]);
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let refused = |width: usize, weight: usize, eps: f32| {
            let x = stream.zeros::<bf16>([2, width]).unwrap();
            let weight = stream.zeros::<f32>([weight]).unwrap();
            rms_norm(stream, &x.view(), &weight.view(), eps).unwrap_err().to_string()
        };
        let setting = "rms_norm: the kernel was not launched: a size or setting is out of range or contradicts another";
        assert_eq!(refused(16, 8, 1e-6), "rms_norm: weight must be [16], got [8]");
        assert_eq!(refused(12, 12, 1e-6), setting);
        assert_eq!(refused(65_544, 65_544, 1e-6), setting);
        assert_eq!(refused(16, 16, -1.0), setting);
        assert_eq!(refused(16, 16, f32::NAN), setting);
        let mut x = stream.zeros::<bf16>([2, 40]).unwrap();
        let weight = stream.zeros::<f32>([16]).unwrap();
        let heads = HeadRange { column: 16, num_heads: 2, head_dim: 16 };
        let error =
            rms_norm_heads_into(stream, &mut x.view_mut(), heads, &weight.view(), 1e-6).unwrap_err().to_string();
        assert!(error.starts_with("rms_norm: x must be at least 48 columns wide"), "{error}");
    });
}
