//! `linear` with few rows, at the dense products of published models. The bytes are those of the weights, read once.

use anabranch::cuda::{Epilogue, LinearInput, Tile, linear_into, random};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;

use crate::{
    shapes::{group, stream},
    timing::{Launches, sets},
};

const TOKENS: [usize; 4] = [1, 2, 4, 8];

/// A product: its name, inner width and columns.
const PRODUCTS: [(&str, usize, usize, Epilogue); 6] = [
    ("deepseek-moe-16b/qkv", 2048, 6144, Epilogue::Linear),
    ("deepseek-moe-16b/o", 2048, 2048, Epilogue::Linear),
    ("deepseek-moe-16b/gate_up", 2048, 10_944, Epilogue::SwiGlu),
    ("deepseek-moe-16b/down", 10_944, 2048, Epilogue::Linear),
    ("deepseek-moe-16b/lm_head", 2048, 102_400, Epilogue::Linear),
    ("qwen3-30b-a3b/qkv", 2048, 5120, Epilogue::Linear),
];

/// The kernel for few rows, and the grouped product's smallest tile beside it.
const TILES: [(&str, Tile); 2] = [("", Tile::Auto), ("/grouped", Tile::Rows16)];

pub(crate) fn bench(criterion: &mut Criterion) {
    let Some(stream) = stream("linear") else { return };
    let mut group = group(criterion, "linear");
    for (name, inner, out, epilogue) in PRODUCTS {
        let rows = if epilogue == Epilogue::SwiGlu { 2 * out } else { out };
        group.throughput(Throughput::BytesDecimal((2 * rows * inner) as u64));
        for tokens in TOKENS {
            for (suffix, tile) in TILES {
                group.bench_function(BenchmarkId::new(format!("{name}{suffix}"), tokens), |bencher| {
                    let noise = |shape: [usize; 2], seed| random::<bf16>(&stream, shape, seed, 0.02).unwrap();
                    let weights: Vec<_> =
                        (0..sets(&stream, 2 * rows * inner)).map(|set| noise([rows, inner], set as u64)).collect();
                    let x = noise([tokens, inner], 99);
                    let mut y = stream.zeros::<bf16>([tokens, out]).unwrap();
                    let launches = Launches::capture(&stream, weights.len(), |set| {
                        let input =
                            LinearInput { x: x.view(), weight: weights[set].view(), bias: None, epilogue, tile };
                        linear_into(&stream, &input, &mut y.view_mut()).unwrap();
                    });
                    bencher.iter_custom(|iterations| launches.time(&stream, iterations));
                });
            }
        }
    }
    group.finish();
}
