//! A block in one call, beside the operations it is made of.

use anabranch::{
    Adaptive, Error,
    cuda::{
        Arch, MoeBlock, MoeBuffers, MoeInput, MoeLayer, MoeRouting, RouterLogitsInput, Stream, TopkBuffers, add_into,
        router_logits,
    },
    reference,
};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use super::{
    PATHS, POISON,
    cases::{Case, Choice, any_case},
    plain,
};
use crate::{
    numbers::{BF16, bits, capture, close, normals, widen},
    support::{Guarded, Noise, on_gpu, runner},
};

const EPS: f32 = 1e-5;

/// What a block has beside a layer.
struct Around {
    residual: Vec<bf16>,
    delta: Option<Vec<bf16>>,
    norm: Vec<f32>,
    gate: Vec<bf16>,
}

impl Around {
    fn new(case: &Case, delta: bool) -> Self {
        let ([d, _], tokens, experts) = (case.sizes, case.num_tokens, case.routing.num_experts());
        let mut noise = Noise(case.seed ^ 9);
        Self {
            residual: normals(&mut noise, tokens * d),
            delta: delta.then(|| normals(&mut noise, tokens * d)),
            norm: (0..d).map(|_| noise.normal()).collect(),
            gate: normals(&mut noise, experts * d),
        }
    }
}

/// Device buffers of a call, poisoned and guarded.
struct Call {
    layer: MoeLayer,
    residual: Guarded<bf16>,
    delta: Option<Guarded<bf16>>,
    norm: Guarded<f32>,
    gate: Guarded<bf16>,
    bias: Option<Guarded<f32>>,
    gate_up: Guarded<bf16>,
    down: Guarded<bf16>,
    x: Guarded<bf16>,
    logits: Guarded<f32>,
    ids: Guarded<i32>,
    weights: Guarded<f32>,
    workspace: Guarded<u8>,
    out: Guarded<bf16>,
}

impl Call {
    fn new(stream: &Stream, case: &Case, around: &Around, arch: Arch, junk: u8) -> Self {
        let ([d, n], tokens, of) = (case.sizes, case.num_tokens, case.weights());
        let (experts, topk) = (case.routing.num_experts(), case.routing.topk());
        let (all, huge) = (experts + case.num_shared, bf16::from_f32(3.0e38));
        let layer = MoeLayer::plan(stream.device(), &case.shape(), tokens + case.spare, arch).unwrap();
        let poison = bf16::from_f32(POISON);
        Self {
            residual: Guarded::holding(stream, [tokens, d], &around.residual, huge, 0),
            delta: around.delta.as_ref().map(|delta| Guarded::holding(stream, [tokens, d], delta, huge, 0)),
            norm: Guarded::holding(stream, [d], &around.norm, 3.0e38, 0),
            gate: Guarded::holding(stream, [experts, d], &around.gate, huge, 0),
            bias: case.selection_bias().map(|bias| Guarded::holding(stream, [experts], &bias, 7.0, 0)),
            gate_up: Guarded::holding(stream, [all, 2 * n, d], &of.gate_up, huge, 0),
            down: Guarded::holding(stream, [all, d, n], &of.down, huge, 0),
            x: Guarded::new(stream, [tokens, d], poison, 0),
            logits: Guarded::new(stream, [tokens, experts], POISON, 0),
            ids: Guarded::new(stream, [tokens, topk], 0x5eed, 3),
            weights: Guarded::new(stream, [tokens, topk], POISON, 1),
            workspace: Guarded::new(stream, [layer.workspace_bytes()], junk, 0),
            out: Guarded::new(stream, [tokens, d], poison, 0),
            layer,
        }
    }

    fn launch(&mut self, stream: &Stream) -> Result<(), Error> {
        let mut block = MoeBlock {
            residual: self.residual.view_mut(),
            delta: self.delta.as_ref().map(Guarded::view),
            norm_weight: self.norm.view(),
            norm_eps: EPS,
            gate: self.gate.view(),
            selection_bias: self.bias.as_ref().map(Guarded::view),
            gate_up: self.gate_up.view(),
            down: self.down.view(),
            x: self.x.view_mut(),
            logits: self.logits.view_mut(),
            topk: Some(TopkBuffers { ids: self.ids.view_mut(), weights: self.weights.view_mut() }),
            out: self.out.view_mut(),
        };
        self.layer.forward_block_into(stream, &mut block, &mut self.workspace.view_mut())
    }

    fn read(&self, stream: &Stream) -> Done {
        self.workspace.read(stream);
        Done {
            residual: self.residual.read(stream),
            x: self.x.read(stream),
            logits: self.logits.read(stream),
            ids: self.ids.read(stream),
            weights: self.weights.read(stream),
            out: self.out.read(stream),
        }
    }
}

/// What a call left behind.
struct Done {
    residual: Vec<bf16>,
    x: Vec<bf16>,
    logits: Vec<f32>,
    ids: Vec<i32>,
    weights: Vec<f32>,
    out: Vec<bf16>,
}

type Bits = ([Vec<u16>; 3], [Vec<u32>; 2], Vec<i32>);

impl Done {
    fn bits(&self) -> Bits {
        let floats = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        (
            [bits(&self.residual), bits(&self.x), bits(&self.out)],
            [floats(&self.logits), floats(&self.weights)],
            self.ids.clone(),
        )
    }
}

fn run(stream: &Stream, case: &Case, around: &Around, arch: Arch, junk: u8) -> Done {
    let mut call = Call::new(stream, case, around, arch, junk);
    call.launch(stream).unwrap();
    call.read(stream)
}

/// Each step against its operation, on what the steps before it gave.
fn check_path(stream: &Stream, case: &Case, around: &Around, arch: Arch) -> Result<(), String> {
    let (tokens, [d, n], experts) = (case.num_tokens, case.sizes, case.routing.num_experts());
    let done = run(stream, case, around, arch, 0xa5);
    if done.bits() != run(stream, case, around, arch, 0xff).bits() {
        return Err("the same call twice gave different bits".to_owned());
    }

    let mut residual = stream.upload([tokens, d], &around.residual).unwrap();
    if let Some(delta) = &around.delta {
        let delta = stream.upload([tokens, d], delta).unwrap();
        add_into(stream, &mut residual.view_mut(), &delta.view()).unwrap();
    }
    let residual = stream.download(&residual.view()).unwrap();
    if bits(&residual) != bits(&done.residual) {
        return Err("the residual stream is not the sum".to_owned());
    }
    let expected = reference::rms_norm(&widen(&residual), &around.norm, EPS).unwrap();
    close(&widen(&done.x), &expected, |_, value| (BF16 + 1e-5) * value.abs())?;

    let x = stream.upload([tokens, d], &done.x).unwrap();
    let gate = stream.upload([experts, d], &around.gate).unwrap();
    let logits = router_logits(stream, &RouterLogitsInput { x: x.view(), gate: gate.view(), bias: None }).unwrap();
    let same = |got: &[f32], expected: &[f32]| got.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
    if !same(&done.logits, &stream.download(&logits.view()).unwrap()) {
        return Err("the logits are not router_logits'".to_owned());
    }

    let of = case.weights();
    let all = experts + case.num_shared;
    let bias = case.selection_bias().map(|bias| stream.upload([experts], &bias).unwrap());
    let gate_up = stream.upload([all, 2 * n, d], &of.gate_up).unwrap();
    let down = stream.upload([all, d, n], &of.down).unwrap();
    let input = MoeInput {
        x: x.view(),
        routing: MoeRouting::Logits { logits: logits.view(), selection_bias: bias.as_ref().map(|bias| bias.view()) },
        shared_gate: None,
        gate_up: gate_up.view(),
        down: down.view(),
    };
    let topk = case.routing.topk();
    let mut ids = stream.zeros([tokens, topk]).unwrap();
    let mut weights = stream.zeros([tokens, topk]).unwrap();
    let mut out = stream.zeros::<bf16>([tokens, d]).unwrap();
    let layer = MoeLayer::plan(stream.device(), &case.shape(), tokens + case.spare, arch).unwrap();
    let mut workspace = layer.workspace(stream).unwrap();
    let mut buffers = MoeBuffers {
        out: out.view_mut(),
        topk: Some(TopkBuffers { ids: ids.view_mut(), weights: weights.view_mut() }),
    };
    layer.forward_into(stream, &input, &mut workspace.view_mut(), &mut buffers).unwrap();
    if done.ids != stream.download(&ids.view()).unwrap()
        || !same(&done.weights, &stream.download(&weights.view()).unwrap())
    {
        return Err("the routing is not the layer's".to_owned());
    }
    if bits(&done.out) != bits(&stream.download(&out.view()).unwrap()) {
        return Err("the output is not the layer's".to_owned());
    }
    Ok(())
}

fn check(stream: &Stream, case: &Case, delta: bool) -> Result<(), String> {
    let around = Around::new(case, delta);
    PATHS
        .into_iter()
        .try_for_each(|arch| check_path(stream, case, &around, arch).map_err(|what| format!("{arch}: {what}")))
}

/// Layers that route for themselves, mostly of few tokens.
fn any_block() -> impl Strategy<Value = (Case, bool)> {
    let tokens = prop_oneof![4 => 0..=9_usize, 1 => 0..80_usize];
    (any_case(), tokens, any::<bool>()).prop_map(|(case, num_tokens, delta)| {
        (Case { num_tokens, choice: Choice::Normal, shared_gate: false, ..case }, delta)
    })
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn is_what_its_operations_give() {
    on_gpu(|stream| {
        let tried = |(case, delta): (Case, bool)| check(stream, &case, delta).map_err(TestCaseError::fail);
        runner().run(&any_block(), tried).unwrap();
    });
}

/// One block of a cluster and all, a tile of experts a block and two, rows longer than what is asked for ahead.
#[test]
#[ignore = "needs a CUDA GPU"]
fn named_models() {
    on_gpu(|stream| {
        for tokens in [1, 2, 3, 5, 8, 9] {
            check(stream, &plain(tokens, [8, 2], [4096, 64], Choice::Normal), true).unwrap();
            check(stream, &plain(tokens, [128, 8], [2048, 64], Choice::Normal), true).unwrap();
            check(stream, &Case { num_shared: 2, ..plain(tokens, [64, 6], [2048, 72], Choice::Normal) }, false)
                .unwrap();
            check(stream, &Case { bias: true, ..plain(tokens, [256, 8], [7168, 8], Choice::Normal) }, true).unwrap();
            check(stream, &plain(tokens, [300, 8], [64, 64], Choice::Normal), true).unwrap();
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_and_replayed_on_another_stream_of_hidden_states() {
    on_gpu(|stream| {
        for tokens in [1, 8] {
            let case = Case { num_shared: 1, ..plain(tokens, [64, 6], [264, 128], Choice::Normal) };
            let around = Around::new(&case, true);
            let mut call = Call::new(stream, &case, &around, Arch::Auto, 0xa5);
            let graph = capture(stream, || call.launch(stream).unwrap());
            for seed in [1, 2, 1] {
                let mut noise = Noise(seed);
                let around = Around { residual: normals(&mut noise, tokens * 264), ..Around::new(&case, true) };
                call.residual.fill(stream, &around.residual);
                graph.launch().unwrap();
                assert!(call.read(stream).bits() == run(stream, &case, &around, Arch::Auto, 0xff).bits());
            }
        }
    });
}

/// A NaN in the residual stream is its token's alone.
#[test]
#[ignore = "needs a CUDA GPU"]
fn nan_in_the_residual_stream_stays_with_its_token() {
    on_gpu(|stream| {
        let case = plain(5, [40, 3], [136, 64], Choice::Normal);
        let clean = Around::new(&case, true);
        let mut dirty = Around::new(&case, true);
        dirty.residual[2 * 136 + 9] = bf16::NAN;
        let (clean, dirty) =
            (run(stream, &case, &clean, Arch::Auto, 0).out, run(stream, &case, &dirty, Arch::Auto, 0).out);
        for (token, (clean, dirty)) in clean.chunks_exact(136).zip(dirty.chunks_exact(136)).enumerate() {
            if token == 2 {
                assert!(dirty.iter().all(|value| value.is_nan()));
            } else {
                assert_eq!(bits(clean), bits(dirty), "token {token}");
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn refuses_what_does_not_fit() {
    on_gpu(|stream| {
        let case = plain(2, [16, 2], [64, 64], Choice::Normal);
        let around = Around::new(&case, true);
        let mut call = Call::new(stream, &case, &around, Arch::Auto, 0);
        call.gate = Guarded::new(stream, [15, 64], bf16::ZERO, 0);
        let refusal = call.launch(stream).unwrap_err();
        assert!(matches!(refusal, Error::Shape { operation: "moe_block", .. }), "{refusal}");

        let routing = anabranch::Routing::builder(16, 2).adaptive(Adaptive::Complexity).build().unwrap();
        let case = Case { routing, ..case };
        let refusal = Call::new(stream, &case, &around, Arch::Auto, 0).launch(stream).unwrap_err();
        assert!(refusal.to_string().contains("Complexity"), "{refusal}");
    });
}
