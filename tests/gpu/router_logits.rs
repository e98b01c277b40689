//! `router_logits`: the gate product, for few tokens and many.

use anabranch::{
    Dtype, Error,
    cuda::{RouterLogitsInput, Stream, router_logits, router_logits_into},
    reference::{Linear, Matrix, linear},
};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use crate::{
    numbers::{capture, normals, widen},
    support::{Guarded, Noise, on_gpu, runner},
};

#[derive(Debug, Clone)]
struct Case {
    num_tokens: usize,
    num_experts: usize,
    hidden_size: usize,
    bias: bool,
    seed: u64,
}

struct Values {
    x: Vec<bf16>,
    gate: Vec<bf16>,
    bias: Option<Vec<f32>>,
}

impl Case {
    fn values(&self) -> Values {
        let mut noise = Noise(self.seed);
        let x = normals(&mut noise, self.num_tokens * self.hidden_size);
        let gate = normals(&mut noise, self.num_experts * self.hidden_size);
        Values { x, gate, bias: self.bias.then(|| (0..self.num_experts).map(|_| noise.normal()).collect()) }
    }

    /// The product in float64, of absolute values where `absolute`, which bounds what rounding may do.
    fn expected(&self, values: &Values, absolute: bool) -> Vec<f64> {
        let sign = |x: f64| if absolute { x.abs() } else { x };
        let x: Vec<f64> = widen(&values.x).into_iter().map(sign).collect();
        let gate: Vec<u8> = values.gate.iter().flat_map(|w| bf16::from_f64(sign(w.to_f64())).to_le_bytes()).collect();
        let bias: Option<Vec<f32>> =
            values.bias.as_ref().map(|bias| bias.iter().map(|b| sign(f64::from(*b)) as f32).collect());
        let weight = Matrix::new(Dtype::Bf16, self.num_experts, self.hidden_size, &gate).unwrap();
        linear(&x, self.num_tokens, &Linear { weight, bias: bias.as_deref() }).unwrap()
    }
}

struct Call {
    x: Guarded<bf16>,
    gate: Guarded<bf16>,
    bias: Option<Guarded<f32>>,
    logits: Guarded<f32>,
}

impl Call {
    fn new(stream: &Stream, case: &Case, values: &Values) -> Self {
        let (tokens, experts, d) = (case.num_tokens, case.num_experts, case.hidden_size);
        let huge = bf16::from_f32(3.0e38);
        Self {
            x: Guarded::holding(stream, [tokens, d], &values.x, huge, 0),
            gate: Guarded::holding(stream, [experts, d], &values.gate, huge, 0),
            bias: values.bias.as_ref().map(|bias| Guarded::holding(stream, [experts], bias, 3.0e38, 0)),
            logits: Guarded::new(stream, [tokens, experts], -16_384.0, 0),
        }
    }

    fn launch(&mut self, stream: &Stream) -> Result<(), Error> {
        let bias = self.bias.as_ref().map(Guarded::view);
        let input = RouterLogitsInput { x: self.x.view(), gate: self.gate.view(), bias };
        router_logits_into(stream, &input, &mut self.logits.view_mut())
    }
}

fn run(stream: &Stream, case: &Case, values: &Values) -> Vec<f32> {
    let mut call = Call::new(stream, case, values);
    call.launch(stream).unwrap();
    call.logits.read(stream)
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

fn check_case(stream: &Stream, case: &Case) -> Result<(), String> {
    let values = case.values();
    let logits = run(stream, case, &values);
    if bits(&logits) != bits(&run(stream, case, &values)) {
        return Err("the same call twice gave different bits".to_owned());
    }
    let (expected, size) = (case.expected(&values, false), case.expected(&values, true));
    for (at, logit) in logits.iter().enumerate() {
        // d additions in float32, each of at most the sum of all magnitudes.
        let bound = f64::from(f32::EPSILON) * (case.hidden_size as f64).sqrt().mul_add(2.0, 8.0) * size[at];
        let difference = (f64::from(*logit) - expected[at]).abs();
        if difference.is_nan() || difference > bound {
            return Err(format!("logit {at} is {logit}, not {}", expected[at]));
        }
    }
    Ok(())
}

fn any_case() -> impl Strategy<Value = Case> {
    let tokens = prop_oneof![0..70_usize, 0..9_usize, 60..300_usize];
    let experts =
        prop_oneof![1..=300_usize, prop::sample::select(vec![1, 7, 8, 15, 16, 17, 32, 60, 64, 128, 256, 384, 1024])];
    let eighths = prop_oneof![4 => 1..=40_usize, 1 => prop::sample::select(vec![64, 65, 255, 256])];
    (tokens, experts, eighths, any::<bool>(), any::<u64>()).prop_map(
        |(num_tokens, num_experts, eighths, bias, seed)| {
            // Long rows are for few tokens: the values take their time.
            let num_tokens = if eighths > 40 { num_tokens % 70 } else { num_tokens };
            Case { num_tokens, num_experts, hidden_size: 8 * eighths, bias, seed }
        },
    )
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference() {
    on_gpu(|stream| {
        let tried = |case: Case| check_case(stream, &case).map_err(TestCaseError::fail);
        runner().run(&any_case(), tried).unwrap();
        let deep = Case { num_tokens: 5, num_experts: 256, hidden_size: 7168, bias: false, seed: 8 };
        check_case(stream, &deep).unwrap();
    });
}

/// Within each of the two kernels a token's logits are the same whoever comes along.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_token_does_not_depend_on_its_batch() {
    on_gpu(|stream| {
        for (sizes, num_experts) in
            [([1, 5, 8, 9, 33, 64], 128), ([65, 80, 129, 200, 257, 300], 128), ([1, 8, 64, 65, 150, 300], 60)]
        {
            let all = Case { num_tokens: sizes[5], num_experts, hidden_size: 328, bias: true, seed: 2 };
            let values = all.values();
            let logits = bits(&run(stream, &all, &values));
            for num_tokens in sizes {
                let case = Case { num_tokens, ..all.clone() };
                let fewer = Values { x: values.x[..num_tokens * 328].to_vec(), ..all.values() };
                assert_eq!(bits(&run(stream, &case, &fewer)), logits[..num_tokens * num_experts], "{num_tokens}");
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn nan_and_infinity_stay_with_their_token() {
    on_gpu(|stream| {
        for num_tokens in [3, 20, 64, 100] {
            let case = Case { num_tokens, num_experts: 64, hidden_size: 136, bias: false, seed: 6 };
            let mut values = case.values();
            let clean = run(stream, &case, &values);
            values.x[136 + 7] = bf16::NAN;
            values.x[2 * 136] = bf16::INFINITY;
            let dirty = run(stream, &case, &values);
            for (token, (clean, dirty)) in clean.chunks_exact(64).zip(dirty.chunks_exact(64)).enumerate() {
                match token {
                    1 => assert!(dirty.iter().all(|logit| logit.is_nan())),
                    2 => assert!(dirty.iter().all(|logit| !logit.is_finite())),
                    _ => assert_eq!(bits(clean), bits(dirty), "token {token} of {num_tokens}"),
                }
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_in_a_graph_and_replayed_with_other_values() {
    on_gpu(|stream| {
        for num_tokens in [1, 30, 150] {
            let case = Case { num_tokens, num_experts: 64, hidden_size: 256, bias: true, seed: 1 };
            let (first, second) = (case.values(), Case { seed: 2, ..case.clone() }.values());
            let mut call = Call::new(stream, &case, &first);
            let graph = capture(stream, || call.launch(stream).unwrap());
            for x in [&first.x, &second.x, &first.x] {
                call.x.fill(stream, x);
                graph.launch().unwrap();
                let values = Values { x: x.clone(), ..case.values() };
                assert_eq!(bits(&call.logits.read(stream)), bits(&run(stream, &case, &values)));
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let refused = |x: [usize; 2], gate: [usize; 2], bias: Option<usize>| {
            let (x, gate) = (stream.zeros::<bf16>(x).unwrap(), stream.zeros::<bf16>(gate).unwrap());
            let bias = bias.map(|len| stream.zeros::<f32>([len]).unwrap());
            let bias = bias.as_ref().map(|bias| bias.view());
            let input = RouterLogitsInput { x: x.view(), gate: gate.view(), bias };
            router_logits(stream, &input).unwrap_err().to_string()
        };
        assert_eq!(refused([3, 16], [8, 24], None), "router_logits: gate must be [8, 16], got [8, 24]");
        assert_eq!(refused([3, 16], [8, 16], Some(7)), "router_logits: bias must be [8], got [7]");
        assert_eq!(
            refused([3, 12], [8, 12], None),
            "router_logits: hidden_size must be a multiple of 8 from 8 to 2^30, got 12"
        );
        assert_eq!(
            refused([3, 16], [1025, 16], None),
            "router_logits: number of experts must be from 1 to 1024, got 1025"
        );
    });
}
