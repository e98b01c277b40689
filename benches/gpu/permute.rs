//! permute at published models' shapes. The bytes are ids read twice, slots and inverse written, for the map; rows read once a
//! token and written once a slot, for the rows.

use anabranch::cuda::{PermuteOutput, permute, permute_into, permute_rows_into, permute_workspace};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::{
    shapes::{MODELS, TOKENS, group, rows, stream, topk_ids},
    timing::{Launches, sets},
};

pub(crate) fn bench(criterion: &mut Criterion) {
    let Some(stream) = stream("permute") else { return };
    let mut group_of_maps = group(criterion, "permute");
    for model in &MODELS {
        for tokens in TOKENS {
            let (topk, experts) = (model.topk, model.num_experts);
            let bytes = 16 * tokens * topk;
            group_of_maps.throughput(Throughput::BytesDecimal(bytes as u64));
            group_of_maps.bench_function(BenchmarkId::new(model.name, tokens), |bencher| {
                let ids = topk_ids(tokens, model);
                let mut all: Vec<_> = (0..sets(&stream, bytes))
                    .map(|_| {
                        let ids = stream.upload([tokens, topk], &ids).unwrap();
                        (ids, PermuteOutput::alloc(&stream, tokens, topk, experts).unwrap())
                    })
                    .collect();
                let bytes = permute_workspace(tokens, topk, experts).unwrap();
                let mut workspace = stream.zeros::<u8>([bytes]).unwrap();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let (ids, output) = &mut all[set];
                    permute_into(&stream, &ids.view(), &mut workspace.view_mut(), &mut output.buffers()).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    group_of_maps.finish();

    let mut group_of_rows = group(criterion, "permute_rows");
    for model in &MODELS {
        for tokens in TOKENS {
            let (topk, width) = (model.topk, model.hidden_size);
            let bytes = 2 * width * tokens * (1 + topk);
            group_of_rows.throughput(Throughput::BytesDecimal(bytes as u64));
            group_of_rows.bench_function(BenchmarkId::new(model.name, tokens), |bencher| {
                let ids = stream.upload([tokens, topk], &topk_ids(tokens, model)).unwrap();
                let map = permute(&stream, &ids.view(), model.num_experts).unwrap();
                let mut all: Vec<_> = (0..sets(&stream, bytes))
                    .map(|_| (rows(&stream, tokens, width), rows(&stream, tokens * topk, width)))
                    .collect();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let (x, out) = &mut all[set];
                    permute_rows_into(&stream, &x.view(), &map.slots.view(), topk, &mut out.view_mut()).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    group_of_rows.finish();
}
