//! combine: the weighted sum, and the shared experts after it.

use anabranch::{
    Error,
    cuda::{CombineInput, Float, Stream, combine, combine_into},
    reference,
};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use crate::{
    numbers::{BF16, bits, capture, close, normals, widen},
    support::{Guarded, Noise, on_gpu, runner},
};

#[derive(Debug, Clone)]
struct Case {
    num_tokens: usize,
    topk: usize,
    num_experts: usize,
    hidden_size: usize,
    shared: bool,
    gate: bool,
    /// NaN and infinity in some rows.
    ugly: bool,
    seed: u64,
}

/// What a case computes with, on the host.
struct Values {
    permutation: reference::Permutation,
    y: Vec<bf16>,
    inverse: Vec<i32>,
    weights: Vec<f32>,
    shared: Vec<bf16>,
    gate: Vec<f32>,
}

impl Case {
    fn values(&self) -> Values {
        let mut noise = Noise(self.seed);
        let pairs = self.num_tokens * self.topk;
        let ids: Vec<i32> = (0..pairs).map(|_| (noise.bits() % (self.num_experts as u64 + 1)) as i32 - 1).collect();
        let permutation = reference::Permutation::new(&ids, self.topk, self.num_experts).unwrap();
        let mut y = normals(&mut noise, permutation.slots().len() * self.hidden_size);
        if self.ugly && !y.is_empty() {
            for value in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY] {
                let at = noise.bits() as usize % y.len();
                y[at] = value;
            }
        }
        // What stands beside a dropped slot must not matter, and a row beyond y is one.
        let weight = |noise: &mut Noise, id: i32| if id < 0 { f32::NAN } else { noise.uniform() };
        let inverse = permutation.inverse().iter().enumerate();
        Values {
            y,
            inverse: inverse.map(|(i, row)| row.map_or([-1, i32::MAX][i % 2], |row| row as i32)).collect(),
            weights: ids.iter().map(|id| weight(&mut noise, *id)).collect(),
            shared: normals(&mut noise, self.num_tokens * self.hidden_size),
            gate: (0..self.num_tokens).map(|_| noise.normal() * 3.0).collect(),
            permutation,
        }
    }
}

impl Values {
    /// The result in float64; of absolute values where `absolute`, which bounds what rounding may do.
    fn expected(&self, case: &Case, absolute: bool) -> Vec<f64> {
        let sign = |x: f64| if absolute { x.abs() } else { x };
        let y: Vec<f64> = widen(&self.y).into_iter().map(sign).collect();
        let weights: Vec<f64> = self.weights.iter().map(|weight| sign(f64::from(*weight))).collect();
        let mut out = reference::combine(&y, &weights, &self.permutation, case.hidden_size).unwrap();
        if case.shared {
            for (at, (out, shared)) in out.iter_mut().zip(widen(&self.shared)).enumerate() {
                let gate = 1.0 / (1.0 + (-f64::from(self.gate[at / case.hidden_size])).exp());
                *out += sign(shared) * if case.gate { gate } else { 1.0 };
            }
        }
        out
    }
}

struct Call<O> {
    y: Guarded<bf16>,
    inverse: Guarded<i32>,
    weights: Guarded<f32>,
    shared: Option<Guarded<bf16>>,
    gate: Option<Guarded<f32>>,
    out: Guarded<O>,
}

impl<O: Float + PartialEq> Call<O> {
    fn new(stream: &Stream, case: &Case, values: &Values, poison: O) -> Self {
        let (tokens, topk, width) = (case.num_tokens, case.topk, case.hidden_size);
        let rows = values.permutation.slots().len();
        Self {
            y: Guarded::holding(stream, [rows, width], &values.y, bf16::ONE, 0),
            inverse: Guarded::holding(stream, [tokens, topk], &values.inverse, 0, 1),
            weights: Guarded::holding(stream, [tokens, topk], &values.weights, 1.0, 3),
            shared: case.shared.then(|| Guarded::holding(stream, [tokens, width], &values.shared, bf16::ONE, 0)),
            gate: (case.shared && case.gate).then(|| Guarded::holding(stream, [tokens], &values.gate, 1.0, 1)),
            out: Guarded::new(stream, [tokens, width], poison, 0),
        }
    }

    fn launch(&mut self, stream: &Stream) -> Result<(), Error> {
        let input = CombineInput {
            y: self.y.view(),
            inverse: self.inverse.view(),
            topk_weights: self.weights.view(),
            shared: self.shared.as_ref().map(Guarded::view),
            shared_gate: self.gate.as_ref().map(Guarded::view),
        };
        combine_into(stream, &input, &mut self.out.view_mut())
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let width = prop_oneof![4 => 1..16_usize, 1 => prop::sample::select(vec![255, 256, 257, 896])];
    let tokens = prop_oneof![0..300_usize, 0..3_usize];
    let flags = (any::<bool>(), any::<bool>(), prop::bool::weighted(0.2));
    (tokens, 1..=32_usize, 1..=300_usize, width, flags, any::<u64>()).prop_map(
        |(num_tokens, topk, num_experts, eighths, (shared, gate, ugly), seed)| {
            // The reference takes its time: fewer tokens where rows are long.
            let num_tokens = if eighths > 40 { num_tokens % 20 } else { num_tokens };
            Case { num_tokens, topk, num_experts, hidden_size: 8 * eighths, shared, gate, ugly, seed }
        },
    )
}

fn check_case(stream: &Stream, case: &Case) -> Result<(), String> {
    let values = case.values();
    let expected = values.expected(case, false);
    let size = values.expected(case, true);
    // K roundings of the sum's size, and one to bf16.
    let slack = |at: usize| f64::from(f32::EPSILON) * (case.topk as f64 + 4.0) * size[at];
    let run = || {
        let mut call = Call::new(stream, case, &values, bf16::from_f32(-77.0));
        call.launch(stream).unwrap();
        call.out.read(stream)
    };
    let out = run();
    if bits(&out) != bits(&run()) {
        return Err("the same call twice gave different bits".to_owned());
    }
    close(&widen(&out), &expected, |at, value| BF16 * value.abs() + slack(at))?;
    let mut call = Call::new(stream, case, &values, -77.0_f32);
    call.launch(stream).unwrap();
    let out: Vec<f64> = call.out.read(stream).into_iter().map(f64::from).collect();
    close(&out, &expected, |at, _| slack(at))
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference() {
    on_gpu(|stream| {
        let tried = |case: Case| check_case(stream, &case).map_err(TestCaseError::fail);
        runner().run(&any_case(), tried).unwrap();
    });
}

const PLAIN: Case = Case {
    num_tokens: 200,
    topk: 8,
    num_experts: 60,
    hidden_size: 2048,
    shared: true,
    gate: true,
    ugly: false,
    seed: 4,
};

#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_in_a_graph_and_replayed_with_other_values() {
    on_gpu(|stream| {
        let values = PLAIN.values();
        let mut call = Call::new(stream, &PLAIN, &values, bf16::ZERO);
        let graph = capture(stream, || call.launch(stream).unwrap());
        let doubled: Vec<f32> = values.weights.iter().map(|weight| 2.0 * weight).collect();
        let mut results = Vec::new();
        for weights in [&values.weights, &doubled, &values.weights] {
            call.weights.fill(stream, weights);
            graph.launch().unwrap();
            results.push(bits(&call.out.read(stream)));
        }
        assert!(results[0] == results[2] && results[0] != results[1]);
        let mut eager = Call::new(stream, &PLAIN, &values, bf16::ZERO);
        eager.launch(stream).unwrap();
        assert!(results[0] == bits(&eager.out.read(stream)));
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_token_does_not_depend_on_its_batch() {
    on_gpu(|stream| {
        let values = PLAIN.values();
        let mut call = Call::new(stream, &PLAIN, &values, bf16::ZERO);
        call.launch(stream).unwrap();
        let all = bits(&call.out.read(stream));
        let width = PLAIN.hidden_size;
        // The last token alone, its rows where they were.
        let (last, case) = (PLAIN.num_tokens - 1, Case { num_tokens: 1, ..PLAIN });
        let alone = Values {
            inverse: values.inverse[last * PLAIN.topk..].to_vec(),
            weights: values.weights[last * PLAIN.topk..].to_vec(),
            shared: values.shared[last * width..].to_vec(),
            gate: values.gate[last..].to_vec(),
            ..values
        };
        let mut call = Call::new(stream, &case, &alone, bf16::ZERO);
        call.launch(stream).unwrap();
        assert!(bits(&call.out.read(stream)) == all[last * width..]);
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let refused = |y: [usize; 2], weights: [usize; 2], shared: Option<[usize; 2]>, gate: Option<usize>| {
            let y = stream.zeros::<bf16>(y).unwrap();
            let inverse = stream.zeros::<i32>([3, 2]).unwrap();
            let weights = stream.zeros::<f32>(weights).unwrap();
            let shared = shared.map(|shape| stream.zeros::<bf16>(shape).unwrap());
            let gate = gate.map(|len| stream.zeros::<f32>([len]).unwrap());
            let input = CombineInput {
                y: y.view(),
                inverse: inverse.view(),
                topk_weights: weights.view(),
                shared: shared.as_ref().map(|shared| shared.view()),
                shared_gate: gate.as_ref().map(|gate| gate.view()),
            };
            combine::<bf16>(stream, &input).unwrap_err().to_string()
        };
        assert_eq!(refused([6, 16], [2, 3], None, None), "combine: topk_weights must be [3, 2], got [2, 3]");
        assert_eq!(refused([6, 16], [3, 2], Some([3, 8]), None), "combine: shared must be [3, 16], got [3, 8]");
        assert_eq!(
            refused([6, 16], [3, 2], None, Some(3)),
            "combine: shared_gate must be absent without shared experts, got given"
        );
        assert_eq!(
            refused([6, 12], [3, 2], None, None),
            "combine: the kernel was not launched: a size or setting is out of range or contradicts another"
        );
    });
}
