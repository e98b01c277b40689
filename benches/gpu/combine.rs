//! combine at published models' shapes. The bytes are one read of every expert's answer and one write of the sums.

use anabranch::cuda::{CombineInput, combine_into, permute};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::{
    shapes::{MODELS, Noise, TOKENS, group, rows, stream, topk_ids},
    timing::{Launches, sets},
};

pub(crate) fn bench(criterion: &mut Criterion) {
    let Some(stream) = stream("combine") else { return };
    let mut group = group(criterion, "combine");
    for model in &MODELS {
        for tokens in TOKENS {
            let (topk, width) = (model.topk, model.hidden_size);
            let bytes = 2 * width * tokens * (1 + topk);
            group.throughput(Throughput::BytesDecimal(bytes as u64));
            group.bench_function(BenchmarkId::new(model.name, tokens), |bencher| {
                let ids = stream.upload([tokens, topk], &topk_ids(tokens, model)).unwrap();
                let map = permute(&stream, &ids.view(), model.num_experts).unwrap();
                let mut noise = Noise::new();
                let weights: Vec<f32> = (0..tokens * topk).map(|_| noise.uniform()).collect();
                let weights = stream.upload([tokens, topk], &weights).unwrap();
                let mut all: Vec<_> = (0..sets(&stream, bytes))
                    .map(|_| (rows(&stream, tokens * topk, width), rows(&stream, tokens, width)))
                    .collect();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let (y, out) = &mut all[set];
                    let input = CombineInput {
                        y: y.view(),
                        inverse: map.inverse.view(),
                        topk_weights: weights.view(),
                        shared: None,
                        shared_gate: None,
                    };
                    combine_into(&stream, &input, &mut out.view_mut()).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    group.finish();
}
