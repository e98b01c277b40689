//! `moe_layer`: from logits or a given routing to the layer's output, on both paths.

mod block;
mod cases;

use anabranch::{
    Adaptive, Error, Renormalize, Routing, Score,
    cuda::{
        Arch, MoeBuffers, MoeInput, MoeLayer, MoeRouting, MoeShape, RouterInput, Stream, Tensor, TopkBuffers, router,
    },
};
use cases::{Case, Choice, Weights, any_case, close, floats};
use half::bf16;
use proptest::test_runner::TestCaseError;

use crate::{
    layers::{self, Golden},
    numbers::{bits, capture},
    router::compare,
    support::{Guarded, on_gpu, runner},
};

/// What the output is poisoned with: no result comes near it.
const POISON: f32 = -16_384.0;
/// What stands around x and the weights: an access out of bounds makes results infinite.
const HUGE: f32 = 3.0e38;
/// Relative Frobenius error of a layer, and of its worst row.
const LAYER: f64 = 5e-3;
const ROW: f64 = 2e-2;
/// Tokens that are compared with the reference where there are more.
const SAMPLED: usize = 48;

/// Both paths, where there are two.
const PATHS: [Arch; 2] = [Arch::Sm80, Arch::Auto];

/// Device buffers of one call, poisoned and guarded.
struct Call {
    layer: MoeLayer,
    x: Guarded<bf16>,
    logits: Option<Guarded<f32>>,
    bias: Option<Guarded<f32>>,
    gate: Option<Guarded<f32>>,
    gate_up: Guarded<bf16>,
    down: Guarded<bf16>,
    /// Read where a routing is given, else written.
    ids: Guarded<i32>,
    weights: Guarded<f32>,
    workspace: Guarded<u8>,
    out: Guarded<bf16>,
}

impl Call {
    /// `junk` fills the workspace: what lies there must not matter.
    fn new(stream: &Stream, case: &Case, x: &[bf16], of: &Weights, arch: Arch, junk: u8) -> Self {
        let ([d, n], tokens) = (case.sizes, case.num_tokens);
        let (experts, topk) = (case.routing.num_experts(), case.routing.topk());
        let all = experts + case.num_shared;
        let layer = MoeLayer::plan(stream.device(), &case.shape(), tokens + case.spare, arch).unwrap();
        let huge = bf16::from_f32(HUGE);
        let floats = |values: &Vec<f32>| Guarded::holding(stream, [values.len()], values, 7.0, 0);
        let (ids, weights) = if case.choice.is_given() {
            let (ids, weights) = case.given();
            let weights = Guarded::holding(stream, [tokens, topk], &weights, 7.0, 1);
            (Guarded::holding(stream, [tokens, topk], &ids, 0, 3), weights)
        } else {
            (Guarded::new(stream, [tokens, topk], 0x5eed, 3), Guarded::new(stream, [tokens, topk], -77.0, 1))
        };
        Self {
            x: Guarded::holding(stream, [tokens, d], x, huge, 0),
            logits: (!case.choice.is_given())
                .then(|| Guarded::holding(stream, [tokens, experts], &case.logits(), 7.0, 1)),
            bias: case.selection_bias().as_ref().map(floats),
            gate: case.gate().as_ref().map(floats),
            gate_up: Guarded::holding(stream, [all, 2 * n, d], &of.gate_up, huge, 0),
            down: Guarded::holding(stream, [all, d, n], &of.down, huge, 0),
            ids,
            weights,
            workspace: Guarded::new(stream, [layer.workspace_bytes()], junk, 0),
            out: Guarded::new(stream, [tokens, d], bf16::from_f32(POISON), 0),
            layer,
        }
    }

    fn launch(&mut self, stream: &Stream) -> Result<(), Error> {
        let mut output = MoeBuffers::from(self.out.view_mut());
        let routing = match &self.logits {
            Some(logits) => {
                output.topk = Some(TopkBuffers { ids: self.ids.view_mut(), weights: self.weights.view_mut() });
                MoeRouting::Logits { logits: logits.view(), selection_bias: self.bias.as_ref().map(Guarded::view) }
            }
            None => MoeRouting::Given { topk_ids: self.ids.view(), topk_weights: self.weights.view() },
        };
        let input = MoeInput {
            x: self.x.view(),
            routing,
            shared_gate: self.gate.as_ref().map(Guarded::view),
            gate_up: self.gate_up.view(),
            down: self.down.view(),
        };
        self.layer.forward_into(stream, &input, &mut self.workspace.view_mut(), &mut output)
    }

    /// The result, once nothing outside of it is found changed.
    fn read(&self, stream: &Stream) -> Done {
        self.workspace.read(stream);
        self.x.read(stream);
        Done { out: self.out.read(stream), ids: self.ids.read(stream), weights: self.weights.read(stream) }
    }
}

/// What a call left behind.
struct Done {
    out: Vec<bf16>,
    ids: Vec<i32>,
    weights: Vec<f32>,
}

impl Done {
    fn bits(&self) -> (Vec<u16>, Vec<i32>, Vec<u32>) {
        (bits(&self.out), self.ids.clone(), self.weights.iter().map(|weight| weight.to_bits()).collect())
    }
}

fn run(stream: &Stream, case: &Case, x: &[bf16], of: &Weights, arch: Arch, junk: u8) -> Done {
    let mut call = Call::new(stream, case, x, of, arch, junk);
    call.launch(stream).unwrap();
    call.read(stream)
}

/// The router's part of a result against the reference, or, where tokens are dropped, against the router on its own.
fn check_routing(stream: &Stream, case: &Case, done: &Done) -> Result<(), String> {
    if case.choice.is_given() {
        return Ok(());
    }
    let (logits, bias, experts) = (case.logits(), case.selection_bias(), case.routing.num_experts());
    if case.routing.capacity().is_none() {
        let inputs = compare::Inputs { logits: &logits, bias: bias.as_deref(), complexity: None };
        let counts = compare::count(experts, &done.ids);
        let routed = compare::Routed { ids: done.ids.clone(), weights: done.weights.clone(), counts };
        return compare::check(&case.routing, &inputs, &routed);
    }
    let logits = stream.upload([case.num_tokens, experts], &logits).unwrap();
    let bias = bias.map(|bias| stream.upload([experts], &bias).unwrap());
    let input =
        RouterInput { logits: logits.view(), selection_bias: bias.as_ref().map(Tensor::view), complexity: None };
    let alone = router(stream, &case.routing, &input).unwrap();
    let ids = stream.download(&alone.topk_ids.view()).unwrap();
    let weights = stream.download(&alone.topk_weights.view()).unwrap();
    if ids == done.ids && weights == done.weights {
        Ok(())
    } else {
        Err("the router on its own drops others".to_owned())
    }
}

fn check_path(stream: &Stream, case: &Case, x: &[bf16], of: &Weights, arch: Arch) -> Result<(), String> {
    let done = run(stream, case, x, of, arch, 0xa5);
    if done.bits() != run(stream, case, x, of, arch, 0xff).bits() {
        return Err("the same call twice gave different bits".to_owned());
    }
    check_routing(stream, case, &done)?;
    if let Some(at) = done.out.iter().position(|value| value.to_f32() == POISON) {
        return Err(format!("element {at} was not written"));
    }
    let (tokens, d) = (case.num_tokens, case.sizes[0]);
    let sampled: Vec<usize> = match tokens {
        0..=300 => (0..tokens).collect(),
        // The first, the last, and some between.
        _ => (0..SAMPLED).map(|at| at * (tokens - 1) / (SAMPLED - 1)).collect(),
    };
    let expected = case.expected(&sampled, x, &done.ids, &done.weights, of);
    let got: Vec<bf16> = sampled.iter().flat_map(|token| &done.out[token * d..(token + 1) * d]).copied().collect();
    close(&floats(&got), &expected, d, LAYER, ROW)
}

fn check(stream: &Stream, case: &Case) -> Result<(), String> {
    let (x, of) = (case.x(), case.weights());
    PATHS
        .into_iter()
        .try_for_each(|arch| check_path(stream, case, &x, &of, arch).map_err(|what| format!("{arch}: {what}")))
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference_over_all_shapes() {
    on_gpu(|stream| {
        let tried = |case: Case| check(stream, &case).map_err(TestCaseError::fail);
        runner().run(&any_case(), tried).unwrap();
    });
}

/// A layer by sizes alone.
fn plain(num_tokens: usize, [experts, topk]: [usize; 2], sizes: [usize; 2], choice: Choice) -> Case {
    Case {
        routing: Routing::builder(experts, topk).renormalize(Renormalize::Sum).build().unwrap(),
        num_tokens,
        spare: 0,
        sizes,
        num_shared: 0,
        shared_gate: false,
        choice,
        bias: false,
        seed: 5 + num_tokens as u64,
    }
}

/// Around every number of tokens at which other kernels or tiles may be chosen.
#[test]
#[ignore = "needs a CUDA GPU"]
fn every_number_of_tokens() {
    const TOKENS: [usize; 26] =
        [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 513];
    on_gpu(|stream| {
        for tokens in TOKENS {
            for choice in [Choice::Normal, Choice::One, Choice::Given] {
                check(stream, &plain(tokens, [20, 3], [256, 128], choice)).unwrap();
                check(stream, &plain(tokens, [64, 6], [136, 72], choice)).unwrap();
                let shared = Case { num_shared: 2, ..plain(tokens, [60, 4], [320, 192], choice) };
                check(stream, &shared).unwrap();
            }
        }
    });
}

/// A token alone has a kernel of its own where x and h fit into a multiprocessor's memory.
#[test]
#[ignore = "needs a CUDA GPU"]
fn one_token() {
    on_gpu(|stream| {
        let choices = [Choice::Normal, Choice::Given, Choice::Repeated, Choice::GivenOne, Choice::Nobody];
        // Rows of less than a step, of a few, of many; fewer columns than warps; more than fit.
        for sizes in [[8, 8], [520, 264], [4104, 40], [136, 2056]] {
            for choice in choices {
                check(stream, &plain(1, [12, 6], sizes, choice)).unwrap();
                check(stream, &Case { num_shared: 2, shared_gate: true, ..plain(1, [5, 2], sizes, choice) }).unwrap();
            }
        }
        check(stream, &plain(1, [8, 6], [2048, 1408], Choice::Normal)).unwrap();
        check(stream, &plain(1, [32, 32], [16, 4096], Choice::Normal)).unwrap();
        for topk in [1, 31, 32] {
            check(stream, &plain(1, [1024, topk], [24, 32], Choice::Given)).unwrap();
        }
    });
}

/// Segments of many tiles, and inner dimensions of many steps.
#[test]
#[ignore = "needs a CUDA GPU"]
fn many_tokens_and_deep_products() {
    on_gpu(|stream| {
        for choice in [Choice::Normal, Choice::Skewed, Choice::One, Choice::Repeated] {
            check(stream, &plain(2500, [60, 4], [256, 192], choice)).unwrap();
            check(stream, &Case { num_shared: 1, ..plain(1000, [16, 2], [520, 328], choice) }).unwrap();
            check(stream, &plain(4099, [8, 2], [128, 64], choice)).unwrap();
        }
        for tokens in [1, 8, 37, 200] {
            check(stream, &plain(tokens, [8, 2], [2048, 1408], Choice::Normal)).unwrap();
            check(stream, &plain(tokens, [6, 2], [1032, 2056], Choice::Normal)).unwrap();
            check(stream, &plain(tokens, [384, 8], [112, 64], Choice::Normal)).unwrap();
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn every_rule_of_the_router() {
    on_gpu(|stream| {
        for score in [Score::Softmax, Score::Sigmoid, Score::TopkSoftmax] {
            for renormalize in [Renormalize::None, Renormalize::Sum] {
                for (tokens, bias) in [(3, false), (70, true), (290, false)] {
                    let rule = Routing::builder(96, 6).score(score).renormalize(renormalize).scale(2.5);
                    let case = plain(tokens, [96, 6], [64, 64], Choice::Normal);
                    check(stream, &Case { routing: rule.build().unwrap(), bias, ..case }).unwrap();
                }
            }
        }
    });
}

/// Anything that waits for the stream, allocates on the side or asks for the counts would break the capture or the replay.
#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_in_a_graph_and_replayed_with_other_routings() {
    on_gpu(|stream| {
        for arch in PATHS {
            for tokens in [1, 8, 40, 64, 200, 1000] {
                let of_seed = |seed, choice| Case { seed, num_shared: 1, ..plain(tokens, [24, 3], [136, 128], choice) };
                let replayed = |routings: &[Case]| {
                    let first = &routings[0];
                    let (x, of) = (first.x(), first.weights());
                    let mut call = Call::new(stream, first, &x, &of, arch, 0xa5);
                    let graph = capture(stream, || call.launch(stream).unwrap());
                    for case in routings {
                        if let Some(logits) = &mut call.logits {
                            logits.fill(stream, &case.logits());
                        } else {
                            let (ids, weights) = case.given();
                            call.ids.fill(stream, &ids);
                            call.weights.fill(stream, &weights);
                        }
                        call.out.fill(stream, &vec![bf16::from_f32(POISON); x.len()]);
                        graph.launch().unwrap();
                        let eager = run(stream, case, &x, &of, arch, 0xff);
                        assert!(call.read(stream).bits() == eager.bits(), "{arch}, {tokens} tokens, {:?}", case.choice);
                    }
                };
                replayed(&[
                    of_seed(1, Choice::Normal),
                    of_seed(2, Choice::One),
                    of_seed(3, Choice::Empty),
                    of_seed(1, Choice::Normal),
                ]);
                replayed(&[
                    of_seed(1, Choice::Given),
                    of_seed(2, Choice::Nobody),
                    of_seed(3, Choice::GivenOne),
                    of_seed(1, Choice::Given),
                ]);
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn nan_and_infinity_stay_with_their_token() {
    on_gpu(|stream| {
        for arch in PATHS {
            for tokens in [3, 8, 16, 64, 90, 300] {
                let case = Case { num_shared: 1, ..plain(tokens, [4, 2], [200, 104], Choice::Normal) };
                let (clean, of) = (case.x(), case.weights());
                let mut dirty = clean.clone();
                let (nan, infinite) = (tokens / 2, tokens - 1);
                dirty[nan * 200 + 199] = bf16::NAN;
                dirty[infinite * 200 + 3] = bf16::INFINITY;
                let clean = run(stream, &case, &clean, &of, arch, 0xa5).out;
                let dirty = run(stream, &case, &dirty, &of, arch, 0xa5).out;
                for (token, (clean, dirty)) in clean.chunks_exact(200).zip(dirty.chunks_exact(200)).enumerate() {
                    let what = format!("{arch}, token {token} of {tokens}");
                    if token == nan {
                        assert!(dirty.iter().all(|value| value.is_nan()), "{what}");
                    } else if token == infinite {
                        assert!(dirty.iter().any(|value| !value.is_finite()), "{what}");
                    } else {
                        assert_eq!(bits(clean), bits(dirty), "{what}");
                    }
                }
            }
        }
    });
}

/// A token's NaN logits make its own weights NaN and nobody else's.
#[test]
#[ignore = "needs a CUDA GPU"]
fn nan_among_the_logits_stays_with_its_token() {
    on_gpu(|stream| {
        for arch in PATHS {
            for tokens in [2, 30, 200] {
                let case = plain(tokens, [24, 3], [64, 40], Choice::Normal);
                let (x, of) = (case.x(), case.weights());
                let clean = run(stream, &case, &x, &of, arch, 0xa5).out;
                let mut call = Call::new(stream, &case, &x, &of, arch, 0xa5);
                let mut logits = case.logits();
                logits[24 + 7] = f32::NAN;
                call.logits.as_mut().unwrap().fill(stream, &logits);
                call.launch(stream).unwrap();
                let dirty = call.read(stream).out;
                assert!(dirty[64..128].iter().all(|value| value.is_nan()), "{arch}");
                let others = |out: &[bf16]| [bits(&out[..64]), bits(&out[128..])];
                assert_eq!(others(&clean), others(&dirty), "{arch}");
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn golden_layers() {
    on_gpu(|stream| {
        let mut tried = 0;
        for name in layers::names() {
            let golden = Golden::open(&name);
            if golden.case["expert"].is_string() {
                continue; // not SwiGLU
            }
            tried += 1;
            let tensors = golden.tensors();
            let floats = |name: &str| layers::floats(&tensors, name);
            let rounded = |name: &str| -> Vec<bf16> { floats(name).unwrap().into_iter().map(bf16::from_f32).collect() };
            let [tokens, d, n] = ["T", "d", "n"].map(|key| golden.size(key));
            let [experts, topk] = ["E", "K"].map(|key| golden.size(key));
            let routing = golden.routing();
            let shape = MoeShape { routing, hidden_size: d, intermediate_size: n, num_shared: 0 };
            let x = stream.upload([tokens, d], &rounded("x")).unwrap();
            let gate_up = stream.upload([experts, 2 * n, d], &rounded("w_gate_up")).unwrap();
            let down = stream.upload([experts, d, n], &rounded("w_down")).unwrap();
            let logits = stream.upload([tokens, experts], &floats("logits").unwrap()).unwrap();
            let bias = floats("bias").map(|bias| stream.upload([experts], &bias).unwrap());
            let (ids, _) = tensors.tensor("topk_idx").unwrap().data().as_chunks();
            let ids: Vec<i32> = ids.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
            let ids = stream.upload([tokens, topk], &ids).unwrap();
            let weights = stream.upload([tokens, topk], &floats("topk_w").unwrap()).unwrap();
            for arch in PATHS {
                let layer = MoeLayer::plan(stream.device(), &shape, tokens, arch).unwrap();
                let given = || MoeRouting::Given { topk_ids: ids.view(), topk_weights: weights.view() };
                let mut routings = vec![given()];
                // A complexity is for the router on its own.
                if routing.adaptive() != Adaptive::Complexity {
                    let selection_bias = bias.as_ref().map(Tensor::view);
                    routings.push(MoeRouting::Logits { logits: logits.view(), selection_bias });
                }
                for routing in routings {
                    let input = MoeInput {
                        x: x.view(),
                        routing,
                        shared_gate: None,
                        gate_up: gate_up.view(),
                        down: down.view(),
                    };
                    let out = layer.forward(stream, &input).unwrap();
                    let out = cases::floats(&stream.download(&out.view()).unwrap());
                    close(&out, &floats("y").unwrap(), d, 1e-2, ROW)
                        .unwrap_or_else(|what| panic!("{name}, {arch}: {what}"));
                }
            }
        }
        assert!(tried > 0);
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_plan_says_what_it_chose() {
    on_gpu(|stream| {
        let routing = Routing::builder(128, 8).build().unwrap();
        let shape = MoeShape { routing, hidden_size: 2048, intermediate_size: 768, num_shared: 0 };
        for arch in PATHS {
            let layer = MoeLayer::plan(stream.device(), &shape, 4096, arch).unwrap();
            let mut most = 0;
            for tokens in [0, 1, 8, 64, 65, 512, 4095, 4096] {
                let plan = layer.describe_for(tokens).unwrap();
                assert!((tokens == 0 || plan.launches >= 1) && plan.workspace_bytes >= most, "{plan}");
                assert!(plan.arch == Arch::Sm80 || plan.tile_rows > 0 && plan.blocks > 0, "{plan}");
                most = plan.workspace_bytes;
            }
            assert_eq!((layer.describe(), most), (layer.describe_for(4096).unwrap(), layer.workspace_bytes()));
            assert_eq!(
                layer.describe_for(4097).unwrap_err().to_string(),
                "moe_layer: number of tokens must be at most 4096, as planned, got 4097"
            );
        }
        let layer = MoeLayer::plan(stream.device(), &shape, 1, Arch::Sm80).unwrap();
        assert_eq!(layer.describe().arch, Arch::Sm80);
    });
}

/// Wherever another tile or front is chosen.
#[test]
#[ignore = "needs a CUDA GPU"]
fn the_workspace_of_more_tokens_does_for_fewer() {
    on_gpu(|stream| {
        for ([experts, topk], sizes) in
            [([128, 8], [2048, 768]), ([1024, 1], [16, 8]), ([384, 32], [16, 8]), ([1, 1], [16, 8])]
        {
            let case = plain(3000, [experts, topk], sizes, Choice::Normal);
            for arch in PATHS {
                let layer = MoeLayer::plan(stream.device(), &case.shape(), 3000, arch).unwrap();
                let bytes = |tokens| layer.describe_for(tokens).unwrap().workspace_bytes;
                let shrinks = (0..3000).find(|tokens| bytes(*tokens) > bytes(tokens + 1));
                assert_eq!(shrinks, None, "{arch}, {experts} experts");
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let plan = |shape: &MoeShape, arch| MoeLayer::plan(stream.device(), shape, 3, arch);
        let routing = Routing::builder(8, 2).build().unwrap();
        let shape = MoeShape { routing, hidden_size: 24, intermediate_size: 8, num_shared: 1 };
        let error = plan(&MoeShape { hidden_size: 20, ..shape }, Arch::Auto).unwrap_err().to_string();
        assert_eq!(error, "moe_layer: hidden_size must be a multiple of 8 from 8 to 2^30, got 20");

        let layer = plan(&shape, Arch::Sm80).unwrap();
        let out_of = |x: [usize; 2], logits: [usize; 2], gate: usize, gate_up: [usize; 3], down: [usize; 3], bytes| {
            let x = stream.zeros::<bf16>(x).unwrap();
            let logits = stream.zeros::<f32>(logits).unwrap();
            let gate = stream.zeros::<f32>([gate]).unwrap();
            let (gate_up, down) = (stream.zeros::<bf16>(gate_up).unwrap(), stream.zeros::<bf16>(down).unwrap());
            let input = MoeInput {
                x: x.view(),
                routing: MoeRouting::Logits { logits: logits.view(), selection_bias: None },
                shared_gate: Some(gate.view()),
                gate_up: gate_up.view(),
                down: down.view(),
            };
            let mut workspace = stream.zeros::<u8>([bytes]).unwrap();
            let mut out = stream.zeros::<bf16>([3, 24]).unwrap();
            let called = layer.forward_into(stream, &input, &mut workspace.view_mut(), &mut out.view_mut().into());
            called.map_err(|error| error.to_string())
        };
        let (up, down, bytes) = ([9, 16, 24], [9, 24, 8], layer.workspace_bytes());
        assert_eq!(out_of([3, 24], [3, 8], 3, up, down, bytes), Ok(()));
        for (called, message) in [
            (out_of([4, 24], [4, 8], 4, up, down, bytes), "number of tokens must be at most 3, as planned, got 4"),
            (out_of([3, 16], [3, 8], 3, up, down, bytes), "x must be [3, 24], got [3, 16]"),
            (out_of([3, 24], [3, 9], 3, up, down, bytes), "logits must be [3, 8], got [3, 9]"),
            (out_of([3, 24], [3, 8], 2, up, down, bytes), "shared_gate must be [3], got [2]"),
            (out_of([3, 24], [3, 8], 3, [8, 16, 24], down, bytes), "gate_up must be [9, 16, 24], got [8, 16, 24]"),
            (out_of([3, 24], [3, 8], 3, up, [9, 8, 24], bytes), "down must be [9, 24, 8], got [9, 8, 24]"),
            (out_of([2, 24], [2, 8], 2, up, down, bytes), "out must be [2, 24], got [3, 24]"),
        ] {
            assert_eq!(called, Err(format!("moe_layer: {message}")));
        }
        let error = out_of([3, 24], [3, 8], 3, up, down, bytes - 1).unwrap_err();
        assert_eq!(error, format!("moe_layer: workspace must be at least {bytes} bytes, got {}", bytes - 1));
    });
}

/// A routing that is given needs none of the router's inputs, and a router none that the layer cannot take.
#[test]
#[ignore = "needs a CUDA GPU"]
fn settings_that_contradict_each_other_are_refused() {
    on_gpu(|stream| {
        let x = stream.zeros::<bf16>([3, 16]).unwrap();
        let (gate_up, down) = (stream.zeros::<bf16>([8, 16, 16]).unwrap(), stream.zeros::<bf16>([8, 16, 8]).unwrap());
        let (logits, ids) = (stream.zeros::<f32>([3, 8]).unwrap(), stream.zeros::<i32>([3, 2]).unwrap());
        let (weights, gate) = (stream.zeros::<f32>([3, 2]).unwrap(), stream.zeros::<f32>([3]).unwrap());
        let refused = |adaptive, given: bool, shared_gate: bool, topk: bool| {
            let routing = Routing::builder(8, 2).adaptive(adaptive).build().unwrap();
            let shape = MoeShape { routing, hidden_size: 16, intermediate_size: 8, num_shared: 0 };
            let layer = MoeLayer::plan(stream.device(), &shape, 3, Arch::Auto).unwrap();
            let routing = if given {
                MoeRouting::Given { topk_ids: ids.view(), topk_weights: weights.view() }
            } else {
                MoeRouting::Logits { logits: logits.view(), selection_bias: None }
            };
            let input = MoeInput {
                x: x.view(),
                routing,
                shared_gate: shared_gate.then(|| gate.view()),
                gate_up: gate_up.view(),
                down: down.view(),
            };
            let mut workspace = layer.workspace(stream).unwrap();
            let mut out = stream.zeros::<bf16>([3, 16]).unwrap();
            let mut topk_ids = stream.zeros::<i32>([3, 2]).unwrap();
            let mut topk_weights = stream.zeros::<f32>([3, 2]).unwrap();
            let mut output = MoeBuffers::from(out.view_mut());
            output.topk = topk.then(|| TopkBuffers { ids: topk_ids.view_mut(), weights: topk_weights.view_mut() });
            layer
                .forward_into(stream, &input, &mut workspace.view_mut(), &mut output)
                .map_err(|error| error.to_string())
        };
        let error = |what: &str| Err(format!("moe_layer: {what}"));
        assert_eq!(refused(Adaptive::Complexity, true, false, false), Ok(()));
        assert_eq!(refused(Adaptive::Entropy, false, false, true), Ok(()));
        assert_eq!(
            refused(Adaptive::Complexity, false, false, false),
            error(
                "routing must be MoeRouting::Given with Adaptive::Complexity: run `router` with the complexity first, \
                 got MoeRouting::Logits"
            )
        );
        assert_eq!(
            refused(Adaptive::Fixed, false, true, false),
            error("shared_gate must be absent without shared experts, got given")
        );
        assert_eq!(
            refused(Adaptive::Fixed, true, false, true),
            error("topk buffers must be absent where the routing is given, got given")
        );
    });
}
