//! `grouped_gemm` at published models' expert layers: the first product with gathering and SwiGLU, and the second.
//!
//! Routing is uniform at random. A point's throughput is in FLOP (criterion's elements) from 512 tokens on and in bytes below, where
//! weights bound the time: those of the experts hit once, x and y once.

use std::{cell::OnceCell, time::Duration};

use anabranch::{
    cuda::{Device, Epilogue, Gather, GroupedGemmInput, Stream, Tensor, Tile, grouped_gemm_into},
    reference::Permutation,
};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;

use crate::timing::{Launches, Noise, sets};

const TOKENS: [usize; 5] = [1, 64, 512, 4096, 16_384];
/// From here on the products bound the time.
const MANY: usize = 512;

/// Bytes of weights that are filled anew: the rest of an array repeats them. Random values take the chip more power than equal ones,
/// and whether they come again after so many bytes makes no difference.
const PATTERN: usize = 1 << 22;

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

/// The tiles to compare where rows are many; elsewhere the one that is chosen.
const TILES: [(&str, Tile); 3] = [("", Tile::Auto), ("/128x128", Tile::Rows128), ("/128x256", Tile::Rows128Wide)];

/// One product of a layer: what it reads and how wide.
struct Product {
    name: &'static str,
    x_rows: usize,
    gathered: bool,
    epilogue: Epilogue,
    depth: usize,
    columns: usize,
    weight_rows: usize,
}

pub(crate) fn bench(criterion: &mut Criterion) {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("grouped_gemm: skipped: {error}");
            return;
        }
    };
    let stream = device.new_stream().unwrap();
    for model in &MODELS {
        for tokens in TOKENS {
            let routing = Routing::random(&stream, model, tokens);
            let first = Product {
                name: "gate_up",
                x_rows: tokens,
                gathered: true,
                epilogue: Epilogue::SwiGlu,
                depth: model.hidden,
                columns: model.width,
                weight_rows: 2 * model.width,
            };
            let second = Product {
                name: "down",
                x_rows: tokens * model.topk,
                gathered: false,
                epilogue: Epilogue::Linear,
                depth: model.width,
                columns: model.hidden,
                weight_rows: model.hidden,
            };
            for product in [first, second] {
                point(criterion, &stream, model, &routing, &product, tokens);
            }
        }
    }
}

fn point(
    criterion: &mut Criterion,
    stream: &Stream,
    model: &Model,
    routing: &Routing,
    product: &Product,
    tokens: usize,
) {
    let rows = tokens * model.topk;
    let matrix = product.weight_rows * product.depth;
    let bytes = 2 * (routing.hit * matrix + tokens * product.depth + rows * product.columns);
    let flop = 2 * rows * matrix;
    let mut group = criterion.benchmark_group(format!("grouped_gemm/{}", product.name));
    group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(300)).sample_size(10);
    group.throughput(if tokens < MANY {
        Throughput::BytesDecimal(bytes as u64)
    } else {
        Throughput::Elements(flop as u64)
    });
    // Made when the first point asks: others may be left out. Weights that are read again while they are in the cache would show
    // a bandwidth that there is none of.
    let made = OnceCell::new();
    let operands = || {
        let weights = [model.experts, product.weight_rows, product.depth];
        let sets = sets(stream, 2 * routing.hit * matrix).min(8);
        let weights: Vec<_> = (0..sets).map(|_| random(stream, weights)).collect();
        (random(stream, [product.x_rows, product.depth]), weights)
    };
    let mut y = stream.zeros::<bf16>([rows, product.columns]).unwrap();
    for (suffix, tile) in if tokens > MANY { &TILES[..] } else { &TILES[..1] } {
        group.bench_function(BenchmarkId::new(format!("{}{suffix}", model.name), tokens), |bencher| {
            let (x, weights) = made.get_or_init(operands);
            let launches = Launches::capture(stream, weights.len(), |set| {
                let input = GroupedGemmInput {
                    x: x.view(),
                    weights: weights[set].view(),
                    bias: None,
                    expert_offsets: routing.offsets.view(),
                    gather: product.gathered.then(|| Gather { slots: routing.slots.view(), topk: model.topk }),
                    epilogue: product.epilogue,
                    tile: *tile,
                };
                grouped_gemm_into(stream, &input, &mut y.view_mut()).unwrap();
            });
            bencher.iter_custom(|iterations| launches.time(stream, iterations));
        });
    }
    group.finish();
    stream.synchronize().unwrap();
}

struct Routing {
    offsets: Tensor<u32>,
    slots: Tensor<u32>,
    hit: usize,
}

impl Routing {
    /// Every token K different experts.
    fn random(stream: &Stream, model: &Model, tokens: usize) -> Self {
        let mut noise = Noise::default();
        let mut ids = Vec::with_capacity(tokens * model.topk);
        for _ in 0..tokens {
            let first = ids.len();
            while ids.len() < first + model.topk {
                let id = (noise.uniform() * model.experts as f32) as i32 % model.experts as i32;
                if !ids[first..].contains(&id) {
                    ids.push(id);
                }
            }
        }
        let permutation = Permutation::new(&ids, model.topk, model.experts).unwrap();
        let offsets: Vec<u32> = permutation.expert_offsets().iter().map(|offset| *offset as u32).collect();
        let slots: Vec<u32> = permutation.slots().iter().map(|slot| *slot as u32).collect();
        Self {
            hit: offsets.windows(2).filter(|range| range[0] < range[1]).count(),
            offsets: stream.upload([offsets.len()], &offsets).unwrap(),
            slots: stream.upload([slots.len()], &slots).unwrap(),
        }
    }
}

fn random(stream: &Stream, shape: impl Into<anabranch::cuda::Shape>) -> Tensor<bf16> {
    let shape = shape.into();
    let mut noise = Noise::default();
    let pattern: Vec<bf16> = (0..PATTERN.min(shape.len())).map(|_| bf16::from_f32(noise.normal() / 8.0)).collect();
    let mut tensor = stream.zeros(shape).unwrap();
    let mut view = tensor.view_mut();
    for start in (0..shape.len()).step_by(PATTERN) {
        let end = shape.len().min(start + PATTERN);
        let mut part = view.cudarc().slice_mut(start..end);
        stream.cudarc().memcpy_htod(&pattern[..end - start], &mut part).unwrap();
    }
    stream.synchronize().unwrap();
    tensor
}
