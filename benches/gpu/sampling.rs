//! argmax and sample at published models' vocabularies, float32 logits. The bytes are one read of the logits.

use anabranch::{
    Sampling,
    cuda::{SampleInput, SampleRow, Stream, Tensor, argmax_into, argmax_workspace, sample_into},
};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::{
    shapes::{MODELS, Noise, group, stream},
    timing::{Launches, sets},
};

/// Sequences that decode together.
const ROWS: [usize; 3] = [1, 16, 64];

fn logits(stream: &Stream, rows: usize, vocab: usize) -> Vec<(Tensor<f32>, Tensor<i32>)> {
    let mut noise = Noise::new();
    let values: Vec<f32> = (0..rows * vocab).map(|_| 3.0 * noise.normal()).collect();
    (0..sets(stream, 4 * rows * vocab))
        .map(|_| (stream.upload([rows, vocab], &values).unwrap(), stream.zeros([rows]).unwrap()))
        .collect()
}

pub(crate) fn bench(criterion: &mut Criterion) {
    let Some(stream) = stream("sampling") else { return };
    let mut greedy = group(criterion, "argmax");
    for model in &MODELS[..2] {
        let vocab = model.vocab_size;
        for rows in ROWS {
            greedy.throughput(Throughput::BytesDecimal((4 * rows * vocab) as u64));
            greedy.bench_function(BenchmarkId::new(model.name, rows), |bencher| {
                let mut all = logits(&stream, rows, vocab);
                let mut workspace = stream.zeros::<u8>([argmax_workspace(rows, vocab).unwrap()]).unwrap();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let (logits, ids) = &mut all[set];
                    argmax_into(&stream, &logits.view(), &mut workspace.view_mut(), &mut ids.view_mut()).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    greedy.finish();

    let mut sampled = group(criterion, "sample");
    let sampling = Sampling::builder().temperature(0.7).top_k(50).top_p(0.9).build().unwrap();
    let row = SampleRow::new(&sampling, 0.6).unwrap();
    for model in &MODELS[..2] {
        let vocab = model.vocab_size;
        for rows in ROWS {
            sampled.throughput(Throughput::BytesDecimal((4 * rows * vocab) as u64));
            sampled.bench_function(BenchmarkId::new(model.name, rows), |bencher| {
                let mut all = logits(&stream, rows, vocab);
                let settings = stream.upload([rows], &vec![row; rows]).unwrap();
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let (logits, ids) = &mut all[set];
                    let mut input = SampleInput { logits: logits.view(), rows: settings.view(), seen: None };
                    sample_into(&stream, &mut input, &mut ids.view_mut()).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    sampled.finish();
}
