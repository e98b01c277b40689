//! router: ids, weights and counts.

mod cases;
pub(crate) mod compare;

use anabranch::{
    Capacity, Error, GroupLimit, GroupScore, Renormalize, Routing, Score,
    cuda::{
        RouterBuffers, RouterInput, Stream, Tensor,
        cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
        router, router_into, router_workspace,
    },
};
use cases::{Case, Flavour, any_case};
use compare::{Inputs, Routed, check, drop_overflow};
use proptest::test_runner::TestCaseError;

use crate::{
    layers::{self, Golden, floats},
    support::{Guarded, Noise, on_gpu, runner},
};

/// Device buffers of one call, poisoned and guarded.
struct Call {
    routing: Routing,
    logits: Guarded<f32>,
    bias: Option<Guarded<f32>>,
    complexity: Option<Guarded<f32>>,
    workspace: Guarded<u8>,
    ids: Guarded<i32>,
    weights: Guarded<f32>,
    counts: Guarded<u32>,
}

impl Call {
    fn new(stream: &Stream, routing: &Routing, inputs: &Inputs<'_>, offset: usize) -> Self {
        let (experts, topk) = (routing.num_experts(), routing.topk());
        let tokens = inputs.logits.len() / experts;
        let floats = |shape: &[usize], values: &[f32]| match *shape {
            [rows, columns] => Guarded::holding(stream, [rows, columns], values, 7.0, offset),
            _ => Guarded::holding(stream, [values.len()], values, 7.0, offset),
        };
        Self {
            routing: *routing,
            logits: floats(&[tokens, experts], inputs.logits),
            bias: inputs.bias.map(|bias| floats(&[experts], bias)),
            complexity: inputs.complexity.map(|complexity| floats(&[tokens], complexity)),
            workspace: Guarded::new(stream, [router_workspace(routing, tokens).unwrap()], 0xa5, 0),
            ids: Guarded::new(stream, [tokens, topk], 0x5eed, 0),
            weights: Guarded::new(stream, [tokens, topk], -77.0, 0),
            counts: Guarded::new(stream, [experts], 0xdead, 0),
        }
    }

    fn launch(&mut self, stream: &Stream) -> Result<(), Error> {
        let input = RouterInput {
            logits: self.logits.view(),
            selection_bias: self.bias.as_ref().map(Guarded::view),
            complexity: self.complexity.as_ref().map(Guarded::view),
        };
        let mut output = RouterBuffers {
            topk_ids: self.ids.view_mut(),
            topk_weights: self.weights.view_mut(),
            expert_counts: self.counts.view_mut(),
        };
        router_into(stream, &self.routing, &input, &mut self.workspace.view_mut(), &mut output)
    }

    /// The result, once nothing outside of it is found changed.
    fn read(&self, stream: &Stream) -> Routed {
        self.workspace.read(stream);
        self.logits.read(stream);
        Routed { ids: self.ids.read(stream), weights: self.weights.read(stream), counts: self.counts.read(stream) }
    }
}

fn route(stream: &Stream, routing: &Routing, inputs: &Inputs<'_>, offset: usize) -> Routed {
    let mut call = Call::new(stream, routing, inputs, offset);
    call.launch(stream).unwrap();
    call.read(stream)
}

/// The same rule, dropless.
fn without_capacity(routing: &Routing) -> Routing {
    let mut dropless = Routing::builder(routing.num_experts(), routing.topk())
        .score(routing.score())
        .renormalize(routing.renormalize())
        .scale(routing.scale())
        .adaptive(routing.adaptive());
    if let Some(limit) = routing.group_limit() {
        dropless = dropless.group_limit(limit);
    }
    dropless.build().unwrap()
}

fn bits(routed: &Routed) -> (Vec<i32>, Vec<u32>, Vec<u32>) {
    (routed.ids.clone(), routed.weights.iter().map(|weight| weight.to_bits()).collect(), routed.counts.clone())
}

fn check_case(stream: &Stream, case: &Case) -> Result<(), String> {
    let (logits, bias, complexity) = (case.logits(), case.bias(), case.complexity());
    let inputs = Inputs { logits: &logits, bias: bias.as_deref(), complexity: complexity.as_deref() };
    let routed = route(stream, &case.routing, &inputs, case.offset);
    if bits(&routed) != bits(&route(stream, &case.routing, &inputs, case.offset)) {
        return Err("the same call twice gave different bits".to_owned());
    }
    // What is dropped hangs on all tokens: one that may rightly differ from the reference would move others. So ids and
    // weights are checked before anything is dropped, and dropping on its own.
    let dropless = without_capacity(&case.routing);
    let Some(capacity) = case.routing.expert_capacity(case.num_tokens) else {
        return check(&dropless, &inputs, &routed);
    };
    let undropped = route(stream, &dropless, &inputs, case.offset);
    check(&dropless, &inputs, &undropped)?;
    let expected = drop_overflow(&case.routing, capacity, &undropped);
    if bits(&routed) == bits(&expected) { Ok(()) } else { Err(format!("dropped {routed:?}\n not {expected:?}")) }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference_over_all_routings() {
    on_gpu(|stream| {
        let tried = |case: Case| check_case(stream, &case).map_err(TestCaseError::fail);
        runner().run(&any_case(), tried).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn golden_layers() {
    on_gpu(|stream| {
        let names = layers::names();
        assert!(!names.is_empty());
        for name in &names {
            let golden = Golden::open(name);
            let tensors = golden.tensors();
            let logits = floats(&tensors, "logits").unwrap();
            let (bias, complexity) = (floats(&tensors, "bias"), floats(&tensors, "complexity"));
            let inputs = Inputs { logits: &logits, bias: bias.as_deref(), complexity: complexity.as_deref() };
            let routing = golden.routing();
            let routed = route(stream, &routing, &inputs, 0);
            let (ids, _) = tensors.tensor("topk_idx").unwrap().data().as_chunks();
            let ids: Vec<i32> = ids.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
            assert_eq!(routed.ids, ids, "{name}");
            let load: Vec<u32> = floats(&tensors, "load").unwrap().iter().map(|count| *count as u32).collect();
            assert_eq!(routed.counts, load, "{name}");
            for (got, expected) in routed.weights.iter().zip(floats(&tensors, "topk_w").unwrap()) {
                let bound = 1e-6 * routing.scale().max(1.0);
                assert!((got - expected).abs() <= bound, "{name}: weight {got}, not {expected}");
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_million_tokens() {
    on_gpu(|stream| {
        // Softmax ranked by logits: no two ways of rounding. Every other expert is overfull.
        let routing = Routing::builder(24, 4).renormalize(Renormalize::Sum).build().unwrap();
        let case = Case { routing, num_tokens: 1 << 20, flavour: Flavour::Normal, bias: false, seed: 9, offset: 0 };
        check_case(stream, &case).unwrap();
        let capacity = Capacity::Tokens((1 << 20) * 4 / 24);
        let routing = Routing::builder(24, 4).renormalize(Renormalize::Sum).capacity(capacity).build().unwrap();
        check_case(stream, &Case { routing, ..case }).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn no_tokens_clear_the_counts() {
    on_gpu(|stream| {
        let routing = Routing::builder(40, 3).build().unwrap();
        let inputs = Inputs { logits: &[], bias: None, complexity: None };
        let routed = route(stream, &routing, &inputs, 0);
        assert_eq!(routed, Routed { ids: vec![], weights: vec![], counts: vec![0; 40] });
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_nan_stays_with_its_token() {
    on_gpu(|stream| {
        let limit = GroupLimit { n_group: 8, topk_group: 4, score: GroupScore::Top2Sum };
        let routing = Routing::builder(256, 8)
            .score(Score::Sigmoid)
            .renormalize(Renormalize::Sum)
            .group_limit(limit)
            .build()
            .unwrap();
        let case = Case { routing, num_tokens: 300, flavour: Flavour::Normal, bias: false, seed: 3, offset: 0 };
        let clean = case.logits();
        let mut dirty = clean.clone();
        dirty[17 * 256 + 5] = f32::NAN;
        let clean = route(stream, &routing, &Inputs { logits: &clean, bias: None, complexity: None }, 0);
        let dirty = route(stream, &routing, &Inputs { logits: &dirty, bias: None, complexity: None }, 0);
        let token = 17 * 8..18 * 8;
        assert!(dirty.weights[token.clone()].iter().all(|weight| weight.is_nan()));
        for at in (0..clean.ids.len()).filter(|at| !token.contains(at)) {
            assert_eq!((clean.ids[at], clean.weights[at].to_bits()), (dirty.ids[at], dirty.weights[at].to_bits()));
        }
    });
}

/// Anything that waits for the stream or allocates on the side would break the capture.
#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_in_a_graph_and_replayed_with_other_logits() {
    on_gpu(|stream| {
        let capacity = Capacity::Factor(1.25);
        let routing = Routing::builder(128, 8).renormalize(Renormalize::Sum).capacity(capacity).build().unwrap();
        let case = |seed| Case { routing, num_tokens: 1000, flavour: Flavour::Normal, bias: false, seed, offset: 0 };
        let (first, second) = (case(1).logits(), case(2).logits());
        let mut call = Call::new(stream, &routing, &Inputs { logits: &first, bias: None, complexity: None }, 0);
        stream.synchronize().unwrap();

        let raw = stream.cudarc();
        raw.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        let launched = call.launch(stream);
        let graph = raw.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
        launched.unwrap();

        for logits in [&first, &second, &first] {
            call.logits.fill(stream, logits);
            graph.launch().unwrap();
            let replayed = call.read(stream);
            let eager = route(stream, &routing, &Inputs { logits, bias: None, complexity: None }, 0);
            assert_eq!(bits(&replayed), bits(&eager));
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn allocating_form_agrees() {
    on_gpu(|stream| {
        let routing = Routing::builder(60, 4).build().unwrap();
        let mut noise = Noise(5);
        let logits: Vec<f32> = (0..33 * 60).map(|_| noise.normal()).collect();
        let expected = route(stream, &routing, &Inputs { logits: &logits, bias: None, complexity: None }, 0);
        let logits = stream.upload([33, 60], &logits).unwrap();
        let input = RouterInput { logits: logits.view(), selection_bias: None, complexity: None };
        let output = router(stream, &routing, &input).unwrap();
        let got = Routed {
            ids: stream.download(&output.topk_ids.view()).unwrap(),
            weights: stream.download(&output.topk_weights.view()).unwrap(),
            counts: stream.download(&output.expert_counts.view()).unwrap(),
        };
        assert_eq!(bits(&got), bits(&expected));
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let routing = Routing::builder(8, 2).build().unwrap();
        let refused = |shape: [usize; 2], bias: Option<usize>, complexity: Option<usize>| {
            let values = |len: usize| stream.zeros::<f32>([len]).unwrap();
            let logits = stream.zeros::<f32>(shape).unwrap();
            let (bias, complexity) = (bias.map(values), complexity.map(values));
            let input = RouterInput {
                logits: logits.view(),
                selection_bias: bias.as_ref().map(Tensor::view),
                complexity: complexity.as_ref().map(Tensor::view),
            };
            router(stream, &routing, &input).unwrap_err().to_string()
        };
        assert_eq!(refused([3, 9], None, None), "router: logits must be [3, 8], got [3, 9]");
        assert_eq!(refused([3, 8], Some(7), None), "router: selection_bias must be [8], got [7]");
        assert_eq!(refused([3, 8], None, Some(3)), "router: complexity must be absent with Adaptive::Fixed, got given");
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_tensor_of_another_stream_is_refused() {
    on_gpu(|stream| {
        let other = stream.device().new_stream().unwrap();
        let routing = Routing::builder(8, 2).build().unwrap();
        let logits = other.zeros::<f32>([3, 8]).unwrap();
        let input = RouterInput { logits: logits.view(), selection_bias: None, complexity: None };
        let error = router(stream, &routing, &input).unwrap_err();
        assert_eq!(error, Error::Place { operation: "router", argument: "logits", place: "stream" });
    });
}
