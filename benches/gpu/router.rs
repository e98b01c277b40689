//! router at published models' shapes. The bytes are one read of the logits and one write of ids and weights.

use std::time::Duration;

use anabranch::{
    GroupLimit, GroupScore, Renormalize, Routing, RoutingBuilder, Score,
    cuda::{Device, RouterInput, RouterOutput, Stream, Tensor, router_into, router_workspace},
};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::timing::{Launches, Noise, sets};

const TOKENS: [usize; 6] = [1, 16, 128, 1024, 4096, 16_384];

struct Model {
    name: &'static str,
    rule: RoutingBuilder,
    bias: bool,
}

fn models() -> Vec<Model> {
    let grouped = |n_group, topk_group, score| GroupLimit { n_group, topk_group, score };
    let sum = Renormalize::Sum;
    let deepseek_v3 = Routing::builder(256, 8).score(Score::Sigmoid).renormalize(sum).scale(2.5);
    vec![
        Model { name: "mixtral", rule: Routing::builder(8, 2).renormalize(sum), bias: false },
        Model { name: "olmoe", rule: Routing::builder(64, 8), bias: false },
        Model { name: "qwen3-30b-a3b", rule: Routing::builder(128, 8).renormalize(sum), bias: false },
        Model {
            name: "deepseek-v2",
            rule: Routing::builder(160, 6).scale(16.0).group_limit(grouped(8, 3, GroupScore::Max)),
            bias: false,
        },
        Model { name: "deepseek-v3", rule: deepseek_v3.group_limit(grouped(8, 4, GroupScore::Top2Sum)), bias: true },
        Model { name: "kimi-k2", rule: Routing::builder(384, 8).score(Score::Sigmoid).renormalize(sum), bias: true },
        Model { name: "qwen3-next", rule: Routing::builder(512, 10).renormalize(sum), bias: false },
    ]
}

/// Buffers of one call.
struct Set {
    logits: Tensor<f32>,
    output: RouterOutput,
}

pub(crate) fn bench(criterion: &mut Criterion) {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("router: skipped: {error}");
            return;
        }
    };
    let stream = device.new_stream().unwrap();
    let mut group = criterion.benchmark_group("router");
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500)).sample_size(20);
    for model in models() {
        let routing = model.rule.build().unwrap();
        for tokens in TOKENS {
            let bytes = 4 * tokens * (routing.num_experts() + 2 * routing.topk());
            group.throughput(Throughput::BytesDecimal(bytes as u64));
            let point = Point::new(&stream, &routing, model.bias, tokens, bytes);
            group.bench_function(BenchmarkId::new(model.name, tokens), |bencher| {
                bencher.iter_custom(|iterations| point.launches.time(&stream, iterations));
            });
        }
    }
    group.finish();
}

/// One shape, ready to run.
struct Point {
    launches: Launches,
    // The graph holds the addresses of these.
    _sets: Vec<Set>,
    _bias: Option<Tensor<f32>>,
    _workspace: Tensor<u8>,
}

impl Point {
    fn new(stream: &Stream, routing: &Routing, bias: bool, tokens: usize, bytes: usize) -> Self {
        let experts = routing.num_experts();
        let noise = normal(tokens * experts);
        let mut sets: Vec<Set> = (0..sets(stream, bytes))
            .map(|_| Set {
                logits: stream.upload([tokens, experts], &noise).unwrap(),
                output: RouterOutput::alloc(stream, routing, tokens).unwrap(),
            })
            .collect();
        let bias = bias.then(|| stream.upload([experts], &normal(experts)).unwrap());
        let mut workspace = stream.zeros::<u8>([router_workspace(routing, tokens).unwrap()]).unwrap();
        let launches = Launches::capture(stream, sets.len(), |set| {
            let Set { logits, output } = &mut sets[set];
            let input = RouterInput {
                logits: logits.view(),
                selection_bias: bias.as_ref().map(Tensor::view),
                complexity: None,
            };
            router_into(stream, routing, &input, &mut workspace.view_mut(), &mut output.buffers()).unwrap();
        });
        Self { launches, _sets: sets, _bias: bias, _workspace: workspace }
    }
}

fn normal(count: usize) -> Vec<f32> {
    let mut noise = Noise::default();
    (0..count).map(|_| noise.normal()).collect()
}
