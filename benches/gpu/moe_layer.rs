//! `moe_layer` from logits to output at published models' shapes, on both paths. The time is what a launch takes within a graph
//! of them, over rotating layers; `anabranch bench moe` measures a single call, nothing of it in the cache.
//!
//! A point's throughput is in FLOP (criterion's elements) from 512 tokens on and in bytes of the weights of experts hit below.

use std::{cell::OnceCell, time::Duration};

use anabranch::{
    Renormalize, Routing,
    cuda::{Arch, MoeInput, MoeLayer, MoeRouting, MoeShape, Stream, Tensor, random},
};
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, measurement::WallTime};
use half::bf16;

use crate::{
    shapes::{Noise, stream},
    timing::{Launches, sets},
};

const TOKENS: [usize; 5] = [1, 8, 64, 512, 4096];
/// From here on the products bound the time.
const MANY: usize = 512;

struct Model {
    name: &'static str,
    hidden: usize,
    width: usize,
    experts: usize,
    topk: usize,
}

const MODELS: [Model; 3] = [
    Model { name: "qwen3-30b-a3b", hidden: 2048, width: 768, experts: 128, topk: 8 },
    Model { name: "deepseek-moe-16b", hidden: 2048, width: 1408, experts: 64, topk: 6 },
    Model { name: "mixtral", hidden: 4096, width: 14_336, experts: 8, topk: 2 },
];

/// A layer's weights.
struct Weights {
    gate_up: Tensor<bf16>,
    down: Tensor<bf16>,
}

impl Model {
    fn shape(&self) -> MoeShape {
        let routing = Routing::builder(self.experts, self.topk).renormalize(Renormalize::Sum).build().unwrap();
        MoeShape { routing, hidden_size: self.hidden, intermediate_size: self.width, num_shared: 0 }
    }

    fn weights(&self, stream: &Stream, seed: u64) -> Weights {
        let Self { hidden: d, width: n, experts, .. } = *self;
        Weights {
            gate_up: random(stream, [experts, 2 * n, d], seed, (d as f32).powf(-0.5)).unwrap(),
            down: random(stream, [experts, d, n], seed + 1, (n as f32).powf(-0.5)).unwrap(),
        }
    }
}

pub(crate) fn bench(criterion: &mut Criterion) {
    let Some(stream) = stream("moe_layer") else { return };
    let mut group = criterion.benchmark_group("moe_layer");
    group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(300)).sample_size(10);
    for model in &MODELS {
        // Enough layers that the cache holds none of them; made when the first point asks, for others may be left out.
        let layers = OnceCell::new();
        let make = || {
            let expert = 6 * model.hidden * model.width;
            let count = sets(&stream, model.topk * expert).min(8);
            (0..count).map(|set| model.weights(&stream, 2 * set as u64)).collect::<Vec<_>>()
        };
        for tokens in TOKENS {
            point(&mut group, &stream, model, tokens, || layers.get_or_init(make));
        }
        drop(layers);
        stream.synchronize().unwrap();
    }
    group.finish();
}

fn point<'a>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    stream: &Stream,
    model: &Model,
    tokens: usize,
    layers: impl Fn() -> &'a Vec<Weights>,
) {
    let mut noise = Noise::new();
    let host: Vec<f32> = (0..tokens * model.experts).map(|_| noise.normal()).collect();
    let expert = 3 * model.hidden * model.width;
    group.throughput(if tokens < MANY {
        Throughput::BytesDecimal((2 * hit(&host, model) * expert) as u64)
    } else {
        Throughput::Elements((2 * tokens * model.topk * expert) as u64)
    });
    let x = random::<bf16>(stream, [tokens, model.hidden], 7, 1.0).unwrap();
    let logits = stream.upload([tokens, model.experts], &host).unwrap();
    let mut out = stream.zeros::<bf16>([tokens, model.hidden]).unwrap();
    for (suffix, arch) in [("", Arch::Auto), ("/sm80", Arch::Sm80)] {
        group.bench_function(BenchmarkId::new(format!("{}{suffix}", model.name), tokens), |bencher| {
            let layer = MoeLayer::plan(stream.device(), &model.shape(), tokens, arch).unwrap();
            let mut workspace = layer.workspace(stream).unwrap();
            let layers = layers();
            let launches = Launches::capture(stream, layers.len(), |set| {
                let input = MoeInput {
                    x: x.view(),
                    routing: MoeRouting::Logits { logits: logits.view(), selection_bias: None },
                    shared_gate: None,
                    gate_up: layers[set].gate_up.view(),
                    down: layers[set].down.view(),
                };
                layer.forward_into(stream, &input, &mut workspace.view_mut(), &mut out.view_mut().into()).unwrap();
            });
            bencher.iter_custom(|iterations| launches.time(stream, iterations));
        });
    }
}

/// Experts that get a token.
fn hit(logits: &[f32], model: &Model) -> usize {
    let mut hit = vec![false; model.experts];
    for row in logits.chunks_exact(model.experts) {
        let mut order: Vec<usize> = (0..model.experts).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
        order[..model.topk].iter().for_each(|expert| hit[*expert] = true);
    }
    hit.into_iter().filter(|hit| *hit).count()
}
