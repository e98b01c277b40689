//! embedding and add at published models' shapes. The bytes are each value read once and written once.

use anabranch::cuda::{add_into, embedding_into};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::{
    shapes::{MODELS, Noise, TOKENS, group, rows, stream},
    timing::{Launches, sets},
};

pub(crate) fn bench(criterion: &mut Criterion) {
    let Some(stream) = stream("embedding") else { return };
    let mut embeddings = group(criterion, "embedding");
    for model in &MODELS {
        let width = model.hidden_size;
        let table = rows(&stream, model.vocab_size, width);
        for tokens in TOKENS {
            let bytes = 4 * tokens * width;
            embeddings.throughput(Throughput::BytesDecimal(bytes as u64));
            embeddings.bench_function(BenchmarkId::new(model.name, tokens), |bencher| {
                let mut noise = Noise::new();
                let mut all: Vec<_> = (0..sets(&stream, bytes))
                    .map(|_| {
                        let id = |_| (noise.bits() % model.vocab_size as u64) as u32;
                        let ids: Vec<u32> = (0..tokens).map(id).collect();
                        (stream.upload([tokens], &ids).unwrap(), rows(&stream, tokens, width))
                    })
                    .collect();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let (ids, out) = &mut all[set];
                    embedding_into(&stream, &table.view(), &ids.view(), &mut out.view_mut()).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    embeddings.finish();

    let mut additions = group(criterion, "add");
    for model in &MODELS {
        let width = model.hidden_size;
        for tokens in TOKENS {
            let bytes = 6 * tokens * width;
            additions.throughput(Throughput::BytesDecimal(bytes as u64));
            additions.bench_function(BenchmarkId::new(model.name, tokens), |bencher| {
                let mut all: Vec<_> = (0..sets(&stream, bytes))
                    .map(|_| (rows(&stream, tokens, width), rows(&stream, tokens, width)))
                    .collect();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let (x, y) = &mut all[set];
                    add_into(&stream, &mut x.view_mut(), &y.view()).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    additions.finish();
}
