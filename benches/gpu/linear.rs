//! `linear` at the shapes of attention's projections, by the kernels' own product and by cuBLASLt where it is installed.
//!
//! A point's throughput is in FLOP (criterion's elements) from 512 tokens on and in bytes below: weight, x and y once.

use anabranch::cuda::{Epilogue, LinearInput, Stream, Tile, linear_into};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;

use crate::{
    shapes::{MODELS, group, rows, stream},
    timing::{Launches, sets},
};

/// Those between which the choice falls, and prefill.
const TOKENS: [usize; 10] = [1, 4, 8, 16, 32, 64, 128, 512, 4096, 16_384];
/// From here on the products bound the time.
const MANY: usize = 512;

pub(crate) fn bench(criterion: &mut Criterion) {
    let Some(own) = stream("linear") else { return };
    let cublaslt = own.device().new_stream().unwrap();
    let mut ways = vec![("own", &own)];
    match cublaslt.enable_cublaslt(1) {
        Ok(()) => ways.push(("cublaslt", &cublaslt)),
        Err(error) => eprintln!("linear: cublaslt skipped: {error}"),
    }
    for model in &MODELS {
        let (heads, kv) = (model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim);
        let projections =
            [("q", model.hidden_size, heads), ("kv", model.hidden_size, kv), ("o", heads, model.hidden_size)];
        for (name, inner, out) in projections {
            let mut products = group(criterion, &format!("linear/{name}"));
            for tokens in TOKENS {
                products.throughput(if tokens < MANY {
                    Throughput::BytesDecimal(bytes(tokens, inner, out) as u64)
                } else {
                    Throughput::Elements((2 * tokens * inner * out) as u64)
                });
                for (way, stream) in &ways {
                    products.bench_function(BenchmarkId::new(format!("{}/{way}", model.name), tokens), |bencher| {
                        let launches = launches(stream, tokens, inner, out);
                        bencher.iter_custom(|iterations| launches.graph.time(stream, iterations));
                    });
                }
            }
            products.finish();
        }
    }
}

fn bytes(tokens: usize, inner: usize, out: usize) -> usize {
    2 * (out * inner + tokens * (inner + out))
}

/// A graph and what it works on.
struct Products {
    graph: Launches,
    _operands: Vec<[anabranch::cuda::Tensor<bf16>; 3]>,
}

fn launches(stream: &Stream, tokens: usize, inner: usize, out: usize) -> Products {
    let mut operands: Vec<_> = (0..sets(stream, bytes(tokens, inner, out)))
        .map(|_| [rows(stream, tokens, inner), rows(stream, out, inner), stream.zeros([tokens, out]).unwrap()])
        .collect();
    let graph = Launches::capture(stream, operands.len(), |set| {
        let [x, weight, y] = &mut operands[set];
        let (epilogue, tile) = (Epilogue::Linear, Tile::Auto);
        let input = LinearInput { x: x.view(), weight: weight.view(), bias: None, epilogue, tile };
        linear_into(stream, &input, &mut y.view_mut()).unwrap();
    });
    Products { graph, _operands: operands }
}
