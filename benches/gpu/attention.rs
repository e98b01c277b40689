//! attention at the shapes of named models: prompts in FLOPs (of the keys that are seen), decoding in bytes of the cache, each
//! read once.

use std::time::Duration;

use anabranch::{
    cuda::{AttentionBatch, AttentionInput, Device, Stream, Tensor, attention_into, attention_workspace},
    reference::AttentionShape,
};
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, measurement::WallTime};
use half::bf16;

use crate::timing::{Launches, sets};

struct Model {
    name: &'static str,
    shape: AttentionShape,
    /// Values are the first elements of keys.
    latent: bool,
}

fn model(name: &'static str, [num_heads, num_kv_heads]: [usize; 2], [key_dim, value_dim]: [usize; 2]) -> Model {
    let shape = AttentionShape { num_heads, num_kv_heads, key_dim, value_dim, scale: (key_dim as f32).powf(-0.5) };
    Model { name, shape, latent: key_dim == 576 }
}

/// Rows of a block of the cache, as the model crate has them.
const BLOCK_SIZE: usize = 64;

/// Bytes of cache beyond which a point is left out.
const MOST_BYTES: usize = 24 << 30;

pub(crate) fn bench(criterion: &mut Criterion) {
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("attention: skipped: {error}");
            return;
        }
    };
    let stream = device.new_stream().unwrap();
    let mut group = criterion.benchmark_group("attention-prefill");
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500)).sample_size(20);
    for (model, tokens) in [
        (model("qwen3-30b-a3b", [32, 4], [128, 128]), 4096),
        (model("qwen3-30b-a3b", [32, 4], [128, 128]), 16_384),
        (model("mha-32x128", [32, 32], [128, 128]), 4096),
        (model("olmoe-1b-7b", [16, 16], [128, 128]), 4096),
        (model("olmoe-1b-7b", [16, 16], [128, 128]), 16_384),
        (model("gpt-oss-64x64", [64, 8], [64, 64]), 4096),
        (model("heads-of-96", [32, 8], [96, 96]), 4096),
        (model("deepseek-v2-lite-expanded", [16, 16], [192, 128]), 4096),
        (model("deepseek-v2-lite-expanded", [16, 16], [192, 128]), 16_384),
        (model("deepseek-v2-lite-absorbed", [16, 1], [576, 512]), 4096),
    ] {
        let AttentionShape { num_heads, key_dim, value_dim, .. } = model.shape;
        let seen = tokens * (tokens + 1) / 2;
        group.throughput(Throughput::Elements((2 * num_heads * (key_dim + value_dim) * seen) as u64));
        point(&mut group, &stream, &model, &tokens.to_string(), 1, [tokens, tokens]);
    }
    group.finish();

    let mut group = criterion.benchmark_group("attention-decode");
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(500)).sample_size(20);
    for model in [
        model("qwen3-30b-a3b", [32, 4], [128, 128]),
        model("deepseek-v2-lite", [16, 1], [576, 512]),
        model("deepseek-v3", [128, 1], [576, 512]),
    ] {
        for sequences in [1, 8, 64] {
            for keys in [1024, 4096, 32_768] {
                let bytes = sequences * keys * row_bytes(&model);
                if bytes > MOST_BYTES {
                    continue;
                }
                group.throughput(Throughput::BytesDecimal(bytes as u64));
                point(&mut group, &stream, &model, &format!("{sequences}x{keys}"), sequences, [1, keys]);
            }
        }
    }
    group.finish();
}

fn row_bytes(model: &Model) -> usize {
    let AttentionShape { num_kv_heads, key_dim, value_dim, .. } = model.shape;
    2 * num_kv_heads * (key_dim + if model.latent { 0 } else { value_dim })
}

/// What one call reads.
struct Set {
    q: Tensor<bf16>,
    keys: Tensor<bf16>,
    values: Option<Tensor<bf16>>,
}

fn point(
    group: &mut BenchmarkGroup<'_, WallTime>,
    stream: &Stream,
    model: &Model,
    name: &str,
    sequences: usize,
    [queries, length]: [usize; 2],
) {
    let shape = &model.shape;
    let table_len = length.div_ceil(BLOCK_SIZE);
    let (tokens, rows) = (sequences * queries, sequences * table_len * BLOCK_SIZE);
    let widths =
        [shape.num_heads * shape.key_dim, shape.num_kv_heads * shape.key_dim, shape.num_kv_heads * shape.value_dim];
    let bytes = rows * row_bytes(model) + 2 * tokens * (widths[0] + shape.num_heads * shape.value_dim);
    let sets: Vec<Set> = (0..sets(stream, bytes))
        .map(|set| Set {
            q: noise(stream, [tokens, widths[0]], set),
            keys: noise(stream, [rows, widths[1]], set + 100),
            values: (!model.latent).then(|| noise(stream, [rows, widths[2]], set + 200)),
        })
        .collect();
    let mut outs: Vec<Tensor<bf16>> =
        sets.iter().map(|_| stream.zeros([tokens, shape.num_heads * shape.value_dim]).unwrap()).collect();
    let numbers = |count: usize, number: &dyn Fn(usize) -> usize| {
        stream.upload([count], &(0..count).map(|i| number(i) as u32).collect::<Vec<_>>()).unwrap()
    };
    let q_offsets = numbers(sequences + 1, &|i| i * queries);
    let kv_lengths = numbers(sequences, &|_| length);
    // Sequences' blocks lie among each other's, as they come when sequences grow side by side.
    let block_table = numbers(sequences * table_len, &|i| i % table_len * sequences + i / table_len);
    let table_starts = numbers(sequences, &|i| i * table_len);
    let input = |index: usize| AttentionInput {
        q: sets[index].q.view(),
        keys: sets[index].keys.view(),
        values: sets[index].values.as_ref().map(Tensor::view),
        batch: AttentionBatch {
            q_offsets: q_offsets.view(),
            kv_lengths: kv_lengths.view(),
            block_table: block_table.view(),
            table_starts: table_starts.view(),
            block_size: BLOCK_SIZE,
            max_q_len: queries,
            max_kv_len: length,
        },
    };
    let workspace = attention_workspace(stream, shape, &input(0)).unwrap();
    let mut workspace = stream.zeros::<u8>([workspace]).unwrap();
    let launches = Launches::capture(stream, sets.len(), |index| {
        let mut out = outs[index].view_mut();
        attention_into(stream, shape, &input(index), &mut workspace.view_mut(), &mut out).unwrap();
    });
    group.bench_function(BenchmarkId::new(model.name, name), |bencher| {
        bencher.iter_custom(|iterations| launches.time(stream, iterations));
    });
}

/// Values of variance 1: a repeated piece of noise.
fn noise(stream: &Stream, shape: [usize; 2], seed: usize) -> Tensor<bf16> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64 ^ (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let piece: Vec<bf16> = (0..100_003)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bf16::from_f32(((state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5) * 12_f32.sqrt())
        })
        .collect();
    let count = shape.iter().product();
    let mut values = Vec::with_capacity(count);
    while values.len() < count {
        values.extend_from_slice(&piece[..piece.len().min(count - values.len())]);
    }
    stream.upload(shape, &values).unwrap()
}
