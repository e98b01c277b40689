//! RMS norm at published models' shapes: plain, after an addition, and of query heads in place. The bytes are each value read
//! once and written once.

use anabranch::cuda::{HeadRange, Stream, Tensor, add_rms_norm_into, rms_norm_heads_into, rms_norm_into};
use criterion::{BenchmarkId, Criterion, Throughput};
use half::bf16;

use crate::{
    shapes::{MODELS, TOKENS, group, rows, stream},
    timing::{Launches, sets},
};

const EPS: f32 = 1e-6;

/// Three matrices a set.
fn matrices(stream: &Stream, tokens: usize, width: usize) -> Vec<[Tensor<bf16>; 3]> {
    (0..sets(stream, 4 * tokens * width)).map(|_| [(); 3].map(|()| rows(stream, tokens, width))).collect()
}

pub(crate) fn bench(criterion: &mut Criterion) {
    let Some(stream) = stream("rms_norm") else { return };
    let mut plain = group(criterion, "rms_norm");
    for model in &MODELS {
        for tokens in TOKENS {
            let width = model.hidden_size;
            plain.throughput(Throughput::BytesDecimal((4 * tokens * width) as u64));
            plain.bench_function(BenchmarkId::new(model.name, tokens), |bencher| {
                let mut all = matrices(&stream, tokens, width);
                let weight = stream.upload([width], &vec![1.0_f32; width]).unwrap();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let [x, out, _] = &mut all[set];
                    rms_norm_into(&stream, &x.view(), &weight.view(), EPS, &mut out.view_mut()).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    plain.finish();

    let mut fused = group(criterion, "add_rms_norm");
    for model in &MODELS {
        for tokens in TOKENS {
            let width = model.hidden_size;
            fused.throughput(Throughput::BytesDecimal((8 * tokens * width) as u64));
            fused.bench_function(BenchmarkId::new(model.name, tokens), |bencher| {
                let mut all = matrices(&stream, tokens, width);
                let weight = stream.upload([width], &vec![1.0_f32; width]).unwrap();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let [x, delta, out] = &mut all[set];
                    let (mut x, mut out) = (x.view_mut(), out.view_mut());
                    add_rms_norm_into(&stream, &mut x, &delta.view(), &weight.view(), EPS, &mut out).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    fused.finish();

    let mut heads = group(criterion, "rms_norm_heads");
    for model in &MODELS {
        for tokens in TOKENS {
            let range = HeadRange { column: 0, num_heads: model.num_heads, head_dim: model.head_dim };
            heads.throughput(Throughput::BytesDecimal((4 * tokens * range.width()) as u64));
            heads.bench_function(BenchmarkId::new(model.name, tokens), |bencher| {
                let mut all: Vec<_> = (0..sets(&stream, 4 * tokens * range.width()))
                    .map(|_| rows(&stream, tokens, range.width()))
                    .collect();
                let weight = stream.upload([range.head_dim], &vec![1.0_f32; range.head_dim]).unwrap();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let mut x = all[set].view_mut();
                    rms_norm_heads_into(&stream, &mut x, range, &weight.view(), EPS).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    heads.finish();
}
