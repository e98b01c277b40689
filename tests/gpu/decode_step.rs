//! `decode_step` against the references, one operation after another.

mod cases;

use std::cell::Cell;

use anabranch::{
    Error,
    cuda::{Arch, DecodeLayer, DecodeProjections, DecodeRouter, DecodeSequence, DecodeStep, RopeTable, Stream},
    reference::AttentionShape,
};
use half::bf16;
use proptest::{
    strategy::{Strategy, ValueTree},
    test_runner::{TestCaseError, TestRunner},
};

use self::cases::{Case, Data, Layer, any_case};
use crate::{
    numbers::{bits, capture, widen},
    support::{Guarded, on_gpu, runner},
};

/// A layer on the device.
struct OnDevice {
    floats: Vec<Guarded<f32>>,
    matrices: Vec<Guarded<bf16>>,
    caches: [Guarded<bf16>; 2],
    routes: bool,
    biased: bool,
    normed: bool,
}

/// Device buffers of a call, guarded.
struct Call<'a> {
    case: &'a Case,
    layers: Vec<OnDevice>,
    rope: RopeTable,
    numbers: [Guarded<i32>; 2],
    words: [Guarded<u32>; 3],
    x: Guarded<bf16>,
    step: DecodeStep,
}

impl<'a> Call<'a> {
    /// Nothing on devices that have no such step.
    fn new(stream: &Stream, case: &'a Case, data: &Data) -> Option<Self> {
        let rope = RopeTable::new(stream, &case.rope()).unwrap();
        let step = DecodeStep::new(stream, &case.shape, rope.rope(), Arch::Auto).unwrap()?;
        let huge = bf16::from_f32(3.0e38);
        let words = [vec![case.length as u32], vec![data.table_start], data.table.clone()];
        Some(Self {
            layers: data.layers.iter().map(|layer| OnDevice::new(stream, case, data.rows, layer)).collect(),
            numbers: [case.length - 1, data.row].map(|value| Guarded::holding(stream, [1], &[value as i32], 0x5eed, 0)),
            words: words.map(|values| Guarded::holding(stream, [values.len()], &values, 0x5eed, 0)),
            x: Guarded::holding(stream, [1, case.shape.hidden_size], &data.x, huge, 0),
            case,
            rope,
            step,
        })
    }

    fn launch(&mut self, stream: &Stream) -> Result<(), Error> {
        let [position, cache_row] = &self.numbers;
        let [kv_length, table_start, block_table] = &self.words;
        let sequence = DecodeSequence {
            position: position.view(),
            cache_row: cache_row.view(),
            kv_length: kv_length.view(),
            table_start: table_start.view(),
            block_table: block_table.view(),
            block_size: self.case.block_size,
        };
        let latent = self.case.shape.latent.is_some();
        let mut layers: Vec<_> = self.layers.iter_mut().map(|layer| layer.layer(latent)).collect();
        self.step.run_into(stream, &self.rope, &mut layers, &sequence, &mut self.x.view_mut())
    }

    /// The input again, for another launch.
    fn reset(&mut self, stream: &Stream, data: &Data) {
        self.x.fill(stream, &data.x);
        for (layer, of) in self.layers.iter_mut().zip(&data.layers) {
            layer.caches[0].fill(stream, &of.k_cache);
            layer.caches[1].fill(stream, &of.v_cache);
        }
    }
}

impl OnDevice {
    fn new(stream: &Stream, case: &Case, rows: usize, layer: &Layer) -> Self {
        let shape = &case.shape;
        let AttentionShape { num_heads: heads, num_kv_heads, key_dim, value_dim, .. } = shape.attention;
        let d = shape.hidden_size;
        let huge = bf16::from_f32(3.0e38);
        let [q_dim, o_dim] = shape.latent.unwrap_or([0, value_dim]);
        let experts = layer.gate.len() / d;
        let floats = [&layer.attention_norm, &layer.q_norm, &layer.k_norm, &layer.feed_forward_norm, &layer.bias];
        let rank = |three: [usize; 3], routes: bool| if routes { three.to_vec() } else { three[1..].to_vec() };
        let (all, n) =
            if layer.routes { (experts + shape.num_shared, shape.intermediate_size) } else { (1, shape.dense_size) };
        let matrices: Vec<(&Vec<bf16>, Vec<usize>)> = vec![
            (&layer.q, vec![layer.q.len() / d, d]),
            (&layer.kv, vec![layer.kv.len() / d, d]),
            (&layer.absorb, vec![heads, layer.absorb.len() / (heads * q_dim.max(1)), q_dim]),
            (&layer.expand, vec![heads, layer.expand.len() / (heads * value_dim), value_dim]),
            (&layer.output, vec![d, heads * o_dim]),
            (&layer.gate, vec![experts, d]),
            (&layer.gate_up, rank([all, 2 * n, d], layer.routes)),
            (&layer.down, rank([all, d, n], layer.routes)),
        ];
        let matrix = |(values, sizes): (&Vec<bf16>, Vec<usize>)| match *sizes {
            [a, b] => Guarded::holding(stream, [a, b], values, huge, 0),
            [a, b, c] => Guarded::holding(stream, [a, b, c], values, huge, 0),
            _ => unreachable!("matrices and stacks of them"),
        };
        let value_width = layer.v_cache.len() / rows;
        Self {
            floats: floats
                .into_iter()
                .map(|values| Guarded::holding(stream, [values.len()], values, 3.0e38, 0))
                .collect(),
            matrices: matrices.into_iter().map(matrix).collect(),
            caches: [
                Guarded::holding(stream, [rows, num_kv_heads * key_dim], &layer.k_cache, huge, 0),
                Guarded::holding(stream, [rows, value_width], &layer.v_cache, huge, 0),
            ],
            routes: layer.routes,
            biased: !layer.bias.is_empty(),
            normed: !layer.q_norm.is_empty(),
        }
    }

    fn layer(&mut self, latent: bool) -> DecodeLayer<'_> {
        let [attention_norm, q_norm, k_norm, feed_forward_norm, bias] = &self.floats[..] else { unreachable!() };
        let [q, kv, absorb, expand, output, gate, gate_up, down] = &self.matrices[..] else { unreachable!() };
        let [k_cache, v_cache] = &mut self.caches;
        let projections = if latent {
            DecodeProjections::Latent {
                q: q.view(),
                kv: kv.view(),
                kv_norm: k_norm.view(),
                absorb: absorb.view(),
                expand: expand.view(),
            }
        } else {
            let norms = self.normed.then(|| [q_norm.view(), k_norm.view()]);
            DecodeProjections::Grouped { qkv: q.view(), norms }
        };
        let selection_bias = self.biased.then(|| bias.view());
        DecodeLayer {
            attention_norm: attention_norm.view(),
            projections,
            output: output.view(),
            k_cache: k_cache.view_mut(),
            v_cache: v_cache.view_mut(),
            feed_forward_norm: feed_forward_norm.view(),
            router: self.routes.then(|| DecodeRouter { gate: gate.view(), selection_bias }),
            gate_up: gate_up.view(),
            down: down.view(),
        }
    }
}

fn any(runner: &mut TestRunner) -> Case {
    any_case().new_tree(runner).unwrap().current()
}

/// What a step left behind: the residual stream, and all caches.
type Done = (Vec<bf16>, Vec<[Vec<bf16>; 2]>);

fn read(stream: &Stream, call: &Call<'_>) -> Done {
    let caches = call.layers.iter().map(|layer| [layer.caches[0].read(stream), layer.caches[1].read(stream)]);
    (call.x.read(stream), caches.collect())
}

fn check(case: &Case, data: &Data, done: &Done) -> Result<bool, String> {
    let expected = case.expected(data);
    // A choice that hangs on rounding may fall otherwise, and everything after it with it.
    if expected.margin < 0.04 {
        return Ok(false);
    }
    // What a layer may be off by adds up; of a few elements, roundings do not average out.
    let most = |elements: usize| case.shape.num_layers as f64 * if elements < 256 { 2e-2 } else { 5e-3 };
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let near = |got: &[bf16], expected: &[f64]| {
        let error = norm(&mut widen(got).iter().zip(expected).map(|(got, expected)| got - expected));
        let whole = norm(&mut expected.iter().copied());
        if error <= most(got.len()) * whole { Ok(()) } else { Err(format!("relative error {:e}", error / whole)) }
    };
    near(&done.0, &expected.x).map_err(|error| format!("x: {error}"))?;
    for (at, (layer, caches)) in data.layers.iter().zip(&done.1).enumerate() {
        for (before, after, new) in
            [(&layer.k_cache, &caches[0], &expected.keys[at]), (&layer.v_cache, &caches[1], &expected.values[at])]
        {
            let width = new.len();
            if width == 0 {
                continue;
            }
            let own = data.row * width..(data.row + 1) * width;
            near(&after[own.clone()], new).map_err(|error| format!("new row of layer {at}: {error}"))?;
            let others = |cache: &[bf16]| [bits(&cache[..own.start]), bits(&cache[own.end..])];
            if others(before) != others(after) {
                return Err(format!("layer {at}: another row of the cache was written"));
            }
        }
    }
    Ok(true)
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn decode_step_agrees_with_the_references() {
    on_gpu(|stream| {
        let (taken, compared) = (Cell::new(0), Cell::new(0));
        runner()
            .run(&any_case(), |case| {
                let data = case.data();
                let Some(mut call) = Call::new(stream, &case, &data) else { return Ok(()) };
                call.launch(stream).unwrap();
                let done = read(stream, &call);
                taken.set(taken.get() + 1);
                let agrees = check(&case, &data, &done).map_err(TestCaseError::fail)?;
                compared.set(compared.get() + usize::from(agrees));
                Ok(())
            })
            .unwrap();
        let (taken, compared) = (taken.get(), compared.get());
        println!("{compared} of {taken} cases had no choice that hangs on rounding");
        assert!(taken == 0 || 4 * compared >= taken);
    });
}

/// Shared experts so wide that a block chooses the routed ones between two of their tiles.
#[test]
#[ignore = "needs a CUDA GPU"]
fn wide_shared_experts() {
    on_gpu(|stream| {
        let (mut taken, mut compared) = (0, 0);
        for seed in 0..6 {
            let case = Case::with_wide_shared_experts(seed);
            let data = case.data();
            let Some(mut call) = Call::new(stream, &case, &data) else { return };
            call.launch(stream).unwrap();
            let done = read(stream, &call);
            taken += 1;
            compared += usize::from(check(&case, &data, &done).unwrap());
            for _ in 0..16 {
                call.reset(stream, &data);
                call.launch(stream).unwrap();
                assert_eq!(bits(&read(stream, &call).0), bits(&done.0), "seed {seed}");
            }
        }
        println!("{compared} of {taken} cases had no choice that hangs on rounding");
        assert!(compared > 0);
    });
}

/// The same bits from the same input, launched or replayed, whatever was computed in between with the same words.
#[test]
#[ignore = "needs a CUDA GPU"]
fn replays_give_the_same_bits() {
    on_gpu(|stream| {
        let mut runner = runner();
        for _ in 0..8 {
            let case = any(&mut runner);
            let data = case.data();
            let Some(mut call) = Call::new(stream, &case, &data) else { continue };
            call.launch(stream).unwrap();
            let first = read(stream, &call);
            let graph = capture(stream, || call.launch(stream).unwrap());
            for _ in 0..3 {
                call.reset(stream, &data);
                graph.launch().unwrap();
                let again = read(stream, &call);
                assert_eq!(bits(&first.0), bits(&again.0), "{case:?}");
                for (one, other) in first.1.iter().zip(&again.1) {
                    assert_eq!([bits(&one[0]), bits(&one[1])], [bits(&other[0]), bits(&other[1])], "{case:?}");
                }
            }
        }
    });
}

/// Numbers on the device that no host has checked: nothing outside of the cache and the table is touched, and the step ends.
#[test]
#[ignore = "needs a CUDA GPU"]
fn numbers_out_of_range_stay_inside() {
    on_gpu(|stream| {
        let mut runner = runner();
        for wrong in [u32::MAX, 0, 1 << 20] {
            let case = any(&mut runner);
            let mut data = case.data();
            data.row = wrong.max(1 << 24) as usize;
            data.table.iter_mut().for_each(|block| *block = wrong);
            let Some(mut call) = Call::new(stream, &case, &data) else { continue };
            call.words[0].fill(stream, &[wrong]);
            call.words[1].fill(stream, &[wrong]);
            call.launch(stream).unwrap();
            let done = read(stream, &call);
            for (layer, caches) in data.layers.iter().zip(&done.1) {
                assert_eq!([bits(&layer.k_cache), bits(&layer.v_cache)], [bits(&caches[0]), bits(&caches[1])]);
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn what_does_not_fit_is_refused() {
    on_gpu(|stream| {
        let case = any(&mut runner());
        let data = case.data();
        let Some(mut call) = Call::new(stream, &case, &data) else { return };
        call.layers.pop();
        let error = call.launch(stream).unwrap_err().to_string();
        assert!(error.starts_with("decode_step: layers must be"), "{error}");
        let mut call = Call::new(stream, &case, &data).unwrap();
        call.x = Guarded::new(stream, [2, case.shape.hidden_size], bf16::ZERO, 0);
        assert!(matches!(call.launch(stream), Err(Error::Shape { argument: "x", .. })));
        assert!(DecodeStep::new(stream, &case.shape, &case.rope(), Arch::Sm80).unwrap().is_none());
    });
}
