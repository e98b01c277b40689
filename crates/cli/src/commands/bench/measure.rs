//! The measurement itself: CUDA events around a call, after the second-level cache has been filled with other data.

use super::{
    check::relative_error,
    logits::{LogitsFile, Spread},
    record::{self, Record, Times},
    shapes::Shape,
};
use crate::{failure::Failure, output, units};
use anabranch::cuda::{
    Arch, Device, Graph, MoeBuffers, MoeInput, MoeLayer, MoePlan, MoeRouting, MoeShape, Recording, RouterLogitsInput,
    Stream, Tensor, TopkBuffers, checksum_into,
    cudarc::driver::{
        CudaEvent, DriverError,
        sys::{CUdevice_attribute, CUevent_flags},
    },
    random, router_logits_into,
};
use half::bf16;
use std::time::{Duration, Instant};

/// What is measured, beside the shape.
pub(super) struct Setting<'a> {
    pub(super) arch: Arch,
    pub(super) num_shared: usize,
    pub(super) spread: Spread,
    pub(super) from_hidden: bool,
    pub(super) logits: Option<&'a LogitsFile>,
    pub(super) steady: bool,
}

/// Layers of a steady state's graph.
const LAYERS: usize = 16;
/// Samples of each kind of launch: at least, and enough.
const SAMPLES: [usize; 2] = [50, 200];
/// Once this long has been spent, the least number of samples is enough: a GPU that multiplies without a rest slows down to keep to its
/// power limit, after a tenth of a second by a sixth.
const ENOUGH: Duration = Duration::from_millis(100);
/// The rest before each kind of launch.
const REST: Duration = Duration::from_millis(500);
/// Once this long has been spent, a third of them is.
const MOST: Duration = Duration::from_millis(2500);
/// Samples between two waits.
const BATCH: usize = 10;
/// Memory that weights leave free for everything else.
const RESERVE: usize = 6 << 30;
const SEED: u64 = 20_261_124;

/// A GPU to measure on.
pub(super) struct Bench {
    pub(super) stream: Stream,
    pub(super) device: String,
    /// More than twice the second-level cache.
    other: Tensor<u32>,
    /// Where its checksum goes.
    word: Tensor<u32>,
    /// Samples of each kind of launch, where they are to be so many.
    samples: Option<usize>,
}

/// A layer's weights, random.
struct Weights {
    gate_up: Tensor<bf16>,
    down: Tensor<bf16>,
    gate: Option<Tensor<bf16>>,
}

/// The buffers of one layer's call.
struct Call {
    layer: MoeLayer,
    x: Tensor<bf16>,
    logits: Tensor<f32>,
    ids: Tensor<i32>,
    weights: Tensor<f32>,
    workspace: Tensor<u8>,
    out: Tensor<bf16>,
}

impl Bench {
    pub(super) fn open(ordinal: usize, samples: Option<usize>) -> Result<Self, Failure> {
        let device = Device::open(ordinal)?;
        let stream = device.new_stream()?;
        let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        let cache = device.context().attribute(attribute).map_err(driver)?.unsigned_abs() as usize;
        let other = stream.zeros([5 * cache / 8])?;
        let word = stream.zeros([1])?;
        Ok(Self { device: device.name()?, stream, other, word, samples })
    }

    /// Measures a shape with every number of its tokens. Its memory is free again afterwards.
    pub(super) fn shape(
        &mut self,
        shape: &Shape,
        setting: &Setting<'_>,
        mut done: impl FnMut(Record) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let result = self.points(shape, setting, &mut done);
        // What was dropped is given back in the stream's order.
        self.stream.synchronize()?;
        result
    }

    fn points(
        &mut self,
        shape: &Shape,
        setting: &Setting<'_>,
        done: &mut impl FnMut(Record) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let layer_bytes = 2 * (shape.experts + setting.num_shared) * shape.expert();
        let sets = if setting.steady { self.sets(layer_bytes)? } else { 1 };
        let plural = if sets == 1 { "" } else { "s" };
        let size = units::bytes((sets * layer_bytes) as u64);
        output::complain(&format!("{}: {sets} layer{plural} of random weights, {size}", shape.name));
        let weights: Vec<Weights> =
            (0..sets).map(|set| self.weights(shape, setting, set as u64)).collect::<Result<_, _>>()?;
        for tokens in &shape.tokens {
            let record = self.point(shape, setting, &weights, *tokens)?;
            let Record { us_median, launch, chosen, .. } = &record;
            output::complain(&format!("{}, {tokens} tokens: {us_median:.1} us ({launch}; {chosen})", shape.name));
            done(record)?;
        }
        Ok(())
    }

    /// Layers whose weights fit into memory at once.
    fn sets(&self, layer_bytes: usize) -> Result<usize, Failure> {
        let (free, _) = self.stream.device().memory()?;
        Ok((free.saturating_sub(RESERVE) / layer_bytes.max(1)).clamp(1, LAYERS))
    }

    fn weights(&self, shape: &Shape, setting: &Setting<'_>, set: u64) -> Result<Weights, Failure> {
        let all = shape.experts + setting.num_shared;
        let (d, n) = (shape.hidden, shape.intermediate);
        let scale = |fan_in: usize| (fan_in as f32).powf(-0.5);
        let seed = SEED + 1000 * set;
        let gate = setting.from_hidden.then(|| random(&self.stream, [shape.experts, d], seed + 3, scale(d)));
        Ok(Weights {
            gate_up: random(&self.stream, [all, 2 * n, d], seed + 1, scale(d))?,
            down: random(&self.stream, [all, d, n], seed + 2, scale(n))?,
            gate: gate.transpose()?,
        })
    }

    fn point(
        &mut self,
        shape: &Shape,
        setting: &Setting<'_>,
        weights: &[Weights],
        tokens: usize,
    ) -> Result<Record, Failure> {
        let (logits, source) = Self::logits(shape, setting, tokens)?;
        let mut call = self.call(shape, setting, &logits, tokens)?;
        // The first call says who visited whom; what is timed leaves that out, as a model would.
        call.launch(&self.stream, &weights[0], true)?;
        let ids = self.stream.download(&call.ids.view())?;
        let mut hit = vec![false; shape.experts];
        ids.iter().for_each(|id| hit[*id as usize] = true);
        let experts_hit = hit.into_iter().filter(|hit| *hit).count();

        let (eager, graph) = if setting.steady {
            (None, self.steady(&mut call, weights)?)
        } else {
            let (eager, graph) = self.single(&mut call, &weights[0])?;
            (Some(eager), graph)
        };
        call.launch(&self.stream, &weights[0], true)?;
        let sampled = relative_error(
            &self.stream,
            shape,
            setting.num_shared,
            [&call.x, &call.out, &weights[0].gate_up, &weights[0].down],
            &ids,
            &self.stream.download(&call.weights.view())?,
        )?;
        let better = eager.as_ref().filter(|eager| eager.median() < graph.median());
        let (times, launch) = better.map_or((&graph, "graph"), |eager| (eager, "eager"));
        let us = times.median();
        Ok(Record {
            shape: shape.name.clone(),
            hidden: shape.hidden,
            intermediate: shape.intermediate,
            experts: shape.experts,
            topk: shape.topk,
            shared: setting.num_shared,
            tokens,
            dtype: "bf16",
            us_median: us,
            us_min: times.min(),
            us_p90: times.p90(),
            experts_hit,
            tflops: record::flops(shape, setting.num_shared, tokens) / us / 1e6,
            weight_gbps: record::weight_bytes(shape, experts_hit + setting.num_shared) / us / 1e3,
            floor_us: record::floor_us(shape, setting.num_shared, experts_hit, tokens),
            rel_error: sampled,
            launch,
            us_eager: eager.as_ref().map(Times::median),
            us_graph: graph.median(),
            samples: times.len(),
            routing: setting.spread.name(),
            from: if setting.from_hidden { "hidden" } else { "logits" },
            logits: source,
            chosen: chosen(&call.layer.describe()),
            steady: setting.steady,
            layers: if setting.steady { LAYERS } else { 1 },
            weight_sets: weights.len(),
            device: self.device.clone(),
        })
    }

    /// Logits of a point, and where they come from.
    fn logits(shape: &Shape, setting: &Setting<'_>, tokens: usize) -> Result<(Vec<f32>, &'static str), Failure> {
        if setting.from_hidden {
            return Ok((vec![0.0; tokens * shape.experts], "gate"));
        }
        if let Some(file) = setting.logits {
            if let Some(logits) = file.find(&shape.name, tokens, shape.experts)? {
                return Ok((logits, "file"));
            }
            output::complain(&format!("{}, {tokens} tokens: no logits in the file, made from a seed", shape.name));
        }
        Ok((setting.spread.logits(SEED, tokens, shape.experts), "seed"))
    }

    fn call(&self, shape: &Shape, setting: &Setting<'_>, logits: &[f32], tokens: usize) -> Result<Call, Failure> {
        let stream = &self.stream;
        let moe = MoeShape {
            routing: shape.routing()?,
            hidden_size: shape.hidden,
            intermediate_size: shape.intermediate,
            num_shared: setting.num_shared,
        };
        let layer = MoeLayer::plan(stream.device(), &moe, tokens, setting.arch)?;
        tracing::info!("the plan\n{}", layer.describe());
        Ok(Call {
            x: random(stream, [tokens, shape.hidden], SEED, 1.0)?,
            logits: stream.upload([tokens, shape.experts], logits)?,
            ids: stream.zeros([tokens, shape.topk])?,
            weights: stream.zeros([tokens, shape.topk])?,
            workspace: layer.workspace(stream)?,
            out: stream.zeros([tokens, shape.hidden])?,
            layer,
        })
    }

    /// Samples of eager calls, then of graph launches, each after the cache has been filled with other data.
    fn single(&mut self, call: &mut Call, weights: &Weights) -> Result<(Times, Times), Failure> {
        let stream = self.stream.clone();
        let graph = capture(&stream, || call.launch(&stream, weights, false))?;
        let eager = self.series(|| call.launch(&stream, weights, false))?;
        let replayed = self.series(|| Ok(graph.launch()?))?;
        Ok((eager, replayed))
    }

    /// Samples of one kind of launch, from rest.
    fn series(&mut self, mut launch: impl FnMut() -> Result<(), Failure>) -> Result<Times, Failure> {
        std::thread::sleep(REST);
        let begin = Instant::now();
        let mut samples = Vec::new();
        let mut warm = false;
        loop {
            let count = self.samples.filter(|_| warm).map_or(BATCH, |all| BATCH.min(all - samples.len()));
            let events = (0..count).map(|_| self.sample(&mut launch)).collect::<Result<Vec<_>, _>>()?;
            self.stream.synchronize()?;
            // The first batch warms up.
            if std::mem::replace(&mut warm, true) {
                for pair in &events {
                    samples.push(elapsed_us(pair)?);
                }
            }
            let done = self.samples.map_or_else(|| enough(samples.len(), begin.elapsed()), |all| samples.len() >= all);
            if done {
                return Ok(Times::new(samples));
            }
        }
    }

    /// Samples of layers back to back in one graph, a layer's share of each. Nothing else fills the cache: the layers' own weights do.
    fn steady(&mut self, call: &mut Call, weights: &[Weights]) -> Result<Times, Failure> {
        let stream = self.stream.clone();
        let graph = capture(&stream, || {
            (0..LAYERS).try_for_each(|layer| call.launch(&stream, &weights[layer % weights.len()], false))
        })?;
        let begin = Instant::now();
        let mut samples = Vec::new();
        let mut warm = false;
        loop {
            let mut events = Vec::new();
            for _ in 0..BATCH {
                events.push(timed(&stream, || Ok(graph.launch()?))?);
            }
            stream.synchronize()?;
            if std::mem::replace(&mut warm, true) {
                for pair in &events {
                    samples.push(elapsed_us(pair)? / LAYERS as f64);
                }
            }
            if enough(samples.len(), begin.elapsed()) {
                return Ok(Times::new(samples));
            }
        }
    }

    fn sample(&mut self, launch: impl FnOnce() -> Result<(), Failure>) -> Result<(CudaEvent, CudaEvent), Failure> {
        // Read, not written: what is written lies in the cache until what is measured drives it out to memory, which takes
        // ten microseconds that are not its own.
        checksum_into(&self.stream, &self.other.view(), &mut self.word.view_mut())?;
        timed(&self.stream, launch)
    }

    /// The median time of something that leaves nothing of use in the cache, in microseconds.
    pub(super) fn median_of(&self, mut launch: impl FnMut(&Stream) -> Result<(), Failure>) -> Result<f64, Failure> {
        const CALLS: usize = 23;
        let events = (0..CALLS).map(|_| timed(&self.stream, || launch(&self.stream))).collect::<Result<Vec<_>, _>>()?;
        self.stream.synchronize()?;
        // The first three warm up.
        Ok(Times::new(events[3..].iter().map(elapsed_us).collect::<Result<_, _>>()?).median())
    }
}

impl Call {
    fn launch(&mut self, stream: &Stream, weights: &Weights, tell: bool) -> Result<(), Failure> {
        if let Some(gate) = &weights.gate {
            let input = RouterLogitsInput { x: self.x.view(), gate: gate.view(), bias: None };
            router_logits_into(stream, &input, &mut self.logits.view_mut())?;
        }
        let input = MoeInput {
            x: self.x.view(),
            routing: MoeRouting::Logits { logits: self.logits.view(), selection_bias: None },
            shared_gate: None,
            gate_up: weights.gate_up.view(),
            down: weights.down.view(),
        };
        let mut output = MoeBuffers::from(self.out.view_mut());
        output.topk = tell.then(|| TopkBuffers { ids: self.ids.view_mut(), weights: self.weights.view_mut() });
        Ok(self.layer.forward_into(stream, &input, &mut self.workspace.view_mut(), &mut output)?)
    }
}

/// What a plan chose, in a few words.
fn chosen(plan: &MoePlan) -> String {
    let tile = if plan.tile_rows == 0 {
        String::new()
    } else {
        format!(" {}x{}x{} on {}", plan.tile_rows, plan.tile_tokens, plan.stages, plan.blocks)
    };
    format!("{}{tile}, {} launch{}", plan.arch, plan.launches, if plan.launches == 1 { "" } else { "es" })
}

fn enough(samples: usize, spent: Duration) -> bool {
    let [least, most] = SAMPLES;
    samples >= most || samples >= least && spent >= ENOUGH || samples >= least.div_ceil(3) && spent >= MOST
}

/// Records what `launch` enqueues as a graph. It is called once before: kernels are loaded at their first launch.
fn capture(stream: &Stream, mut launch: impl FnMut() -> Result<(), Failure>) -> Result<Graph, Failure> {
    launch()?;
    stream.synchronize()?;
    let recording = Recording::begin(stream)?;
    launch()?;
    Ok(recording.finish()?)
}

fn timed(stream: &Stream, launch: impl FnOnce() -> Result<(), Failure>) -> Result<(CudaEvent, CudaEvent), Failure> {
    let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
    let start = stream.cudarc().record_event(flags).map_err(driver)?;
    launch()?;
    let end = stream.cudarc().record_event(flags).map_err(driver)?;
    Ok((start, end))
}

fn elapsed_us((start, end): &(CudaEvent, CudaEvent)) -> Result<f64, Failure> {
    Ok(f64::from(start.elapsed_ms(end).map_err(driver)?) * 1e3)
}

/// An error of the driver's as this program reports it.
pub(super) fn driver(error: DriverError) -> Failure {
    let text = error.error_string().map_or_else(|_| format!("{error:?}"), |text| text.to_string_lossy().into_owned());
    Failure::Failed(format!("the CUDA driver reports: {text}"))
}
