//! The MoE layer inside an engine that has a stream and memory of its own: two layers on borrowed slices of cudarc's, captured
//! together in one CUDA graph, replayed with other activations.
//!
//!     cargo run --release --features cuda --example embed_stream
//!
//! docs/embedding.md has the rules that this keeps.

use std::{error::Error, sync::Arc};

use anabranch::{
    Renormalize, Routing,
    cuda::{
        Arch, MoeInput, MoeLayer, MoeRouting, MoeShape, Stream, View, ViewMut,
        cudarc::driver::{
            CudaContext, CudaSlice, CudaStream, CudaViewMut,
            sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
        },
    },
};
use half::bf16;

const TOKENS: usize = 48;
const HIDDEN: usize = 256;
const WIDTH: usize = 128;
const EXPERTS: usize = 16;

/// A layer as the engine holds it: its weights in the engine's memory, and what its router is to judge by. (An engine
/// would compute logits from the hidden states on the same stream; here they are given.)
struct Layer {
    gate_up: CudaSlice<bf16>,
    down: CudaSlice<bf16>,
    logits: CudaSlice<f32>,
}

/// The engine: context, stream and allocations are cudarc's, and stay the engine's.
struct Engine {
    stream: Arc<CudaStream>,
    layers: [Layer; 2],
    /// One allocation for all activations: input, between the layers, output.
    activations: CudaSlice<bf16>,
    workspace: CudaSlice<u8>,
}

impl Engine {
    fn open(workspace_bytes: impl Fn(&Stream) -> anabranch::Result<usize>) -> Result<Self, Box<dyn Error>> {
        let context = CudaContext::new(0)?;
        // SAFETY: this engine uses one stream, so that nothing is ever used on two without order between them. cudarc
        // would else record an event at every use, which a capture cannot hold.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream()?;
        let mut random = Random(2026);
        let mut layer = || -> Result<Layer, Box<dyn Error>> {
            Ok(Layer {
                gate_up: stream.clone_htod(&random.bf16(EXPERTS * 2 * WIDTH * HIDDEN, 0.15))?,
                down: stream.clone_htod(&random.bf16(EXPERTS * HIDDEN * WIDTH, 0.15))?,
                logits: stream.clone_htod(&random.f32(TOKENS * EXPERTS, 2.0))?,
            })
        };
        let layers = [layer()?, layer()?];
        let activations = stream.alloc_zeros(3 * TOKENS * HIDDEN)?;
        let workspace = stream.alloc_zeros(workspace_bytes(&Stream::from_cudarc(Arc::clone(&stream))?)?)?;
        Ok(Self { stream, layers, activations, workspace })
    }

    /// Enqueues both layers on the engine's stream. Nothing is allocated and nothing waits.
    fn step(&mut self, plan: &MoeLayer) -> Result<(), Box<dyn Error>> {
        let stream = Stream::from_cudarc(Arc::clone(&self.stream))?;
        let (mut input, mut rest) = self.activations.split_at_mut(TOKENS * HIDDEN);
        let (mut between, mut output) = rest.split_at_mut(TOKENS * HIDDEN);
        let mut run = |layer: &Layer, from: &mut CudaViewMut<'_, bf16>, to: &mut CudaViewMut<'_, bf16>| {
            let input = MoeInput {
                x: View::new(from.slice(..), [TOKENS, HIDDEN])?,
                routing: MoeRouting::Logits {
                    logits: View::new(layer.logits.slice(..), [TOKENS, EXPERTS])?,
                    selection_bias: None,
                },
                shared_gate: None,
                gate_up: View::new(layer.gate_up.slice(..), [EXPERTS, 2 * WIDTH, HIDDEN])?,
                down: View::new(layer.down.slice(..), [EXPERTS, HIDDEN, WIDTH])?,
            };
            // Both layers may have the same workspace: on one stream, the second begins when the first is done.
            let bytes = self.workspace.len();
            let mut workspace = ViewMut::new(self.workspace.slice_mut(..), [bytes])?;
            let out = ViewMut::new(to.slice_mut(..), [TOKENS, HIDDEN])?;
            plan.forward_into(&stream, &input, &mut workspace, &mut out.into())
        };
        run(&self.layers[0], &mut input, &mut between)?;
        run(&self.layers[1], &mut between, &mut output)?;
        Ok(())
    }

    fn set_input(&mut self, values: &[bf16]) -> Result<(), Box<dyn Error>> {
        Ok(self.stream.memcpy_htod(values, &mut self.activations.slice_mut(..TOKENS * HIDDEN))?)
    }

    fn output(&self) -> Result<Vec<bf16>, Box<dyn Error>> {
        Ok(self.stream.clone_dtoh(&self.activations.slice(2 * TOKENS * HIDDEN..))?)
    }
}

/// A small generator, for values that are the same everywhere.
struct Random(u64);

impl Random {
    fn f32(&mut self, count: usize, size: f32) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            size * ((self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0)
        };
        (0..count).map(|_| next()).collect()
    }

    fn bf16(&mut self, count: usize, size: f32) -> Vec<bf16> {
        self.f32(count, size).into_iter().map(bf16::from_f32).collect()
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let routing = Routing::builder(EXPERTS, 4).renormalize(Renormalize::Sum).build()?;
    let shape = MoeShape { routing, hidden_size: HIDDEN, intermediate_size: WIDTH, num_shared: 0 };
    // Says in a sentence that there is no GPU, where cudarc would stop the program.
    anabranch::cuda::Device::count()?;
    let plan_on = |stream: &Stream| MoeLayer::plan(stream.device(), &shape, TOKENS, Arch::Auto);
    let mut engine = Engine::open(|stream| Ok(plan_on(stream)?.workspace_bytes()))?;
    let plan = plan_on(&Stream::from_cudarc(Arc::clone(&engine.stream))?)?;
    println!("{}\n", plan.describe());

    // Once before the capture: CUDA loads kernels when they are first launched.
    let mut random = Random(7);
    engine.set_input(&random.bf16(TOKENS * HIDDEN, 1.0))?;
    engine.step(&plan)?;
    engine.stream.synchronize()?;

    engine.stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let enqueued = engine.step(&plan);
    let graph = engine.stream.end_capture(CUgraphInstantiate_flags(0))?;
    enqueued?;
    let graph = graph.ok_or("the capture holds nothing")?;

    for round in 0..3 {
        engine.set_input(&random.bf16(TOKENS * HIDDEN, 1.0))?;
        graph.launch()?;
        let replayed = engine.output()?;
        engine.step(&plan)?;
        let eager = engine.output()?;
        let same = replayed == eager && eager.iter().all(|value| value.is_finite());
        println!("round {round}: out[0][..4] = {:.4?}, graph and eager agree: {same}", &eager[..4]);
        if !same {
            return Err("a replayed graph and the same calls differ".into());
        }
    }
    Ok(())
}
