//! RoPE with cache write at published models' shapes, queries, keys and values in one matrix, and with the norm of each head that
//! Qwen3 has. The bytes are each of their values read once and written once.

use anabranch::{
    Rope, RopeLayout, RopeScaling,
    cuda::{HeadNorm, HeadRange, RopeBuffers, RopeCache, RopeTable, rope_into},
};
use criterion::{BenchmarkId, Criterion, Throughput};

use crate::{
    shapes::{MODELS, TOKENS, group, rows, stream},
    timing::{Launches, sets},
};

pub(crate) fn bench(criterion: &mut Criterion) {
    let Some(stream) = stream("rope") else { return };
    let mut group = group(criterion, "rope");
    for (model, normed) in MODELS.iter().map(|model| (model, false)).chain([(&MODELS[0], true)]) {
        let name = if normed { format!("{}-qk-norm", model.name) } else { model.name.to_owned() };
        let head_dim = model.head_dim;
        // GLM rotates half of a head; what it leaves alone is not moved.
        let rotary_dim = if model.name == "glm-4.5" { head_dim / 2 } else { head_dim };
        let (q, kv) = (model.num_heads * head_dim, model.num_kv_heads * head_dim);
        for tokens in TOKENS {
            let bytes = 4 * tokens * (q * rotary_dim / head_dim + 2 * kv);
            group.throughput(Throughput::BytesDecimal(bytes as u64));
            group.bench_function(BenchmarkId::new(&name, tokens), |bencher| {
                let rope = Rope::new(rotary_dim, 1e6, RopeLayout::Half, RopeScaling::None).unwrap();
                let table = RopeTable::new(&stream, &rope).unwrap();
                let weight = stream.upload([head_dim], &vec![1.0_f32; head_dim]).unwrap();
                let norm = || normed.then(|| HeadNorm { weight: weight.view(), eps: 1e-6 });
                let indices: Vec<i32> = (0..tokens as i32).collect();
                let indices = stream.upload([tokens], &indices).unwrap();
                let cache = || stream.zeros([tokens, model.num_kv_heads, head_dim]).unwrap();
                let mut all: Vec<_> =
                    (0..sets(&stream, bytes)).map(|_| (rows(&stream, tokens, q + 2 * kv), cache(), cache())).collect();
                let range = |column, num_heads| HeadRange { column, num_heads, head_dim };
                let launches = Launches::capture(&stream, all.len(), |set| {
                    let (projected, k_cache, v_cache) = &mut all[set];
                    let cache = RopeCache {
                        keys: None,
                        k: range(q, model.num_kv_heads),
                        k_first: 0,
                        k_norm: norm(),
                        values: None,
                        v: range(q + kv, model.num_kv_heads),
                        rows: indices.view(),
                        k_cache: k_cache.view_mut(),
                        v_cache: v_cache.view_mut(),
                    };
                    let mut buffers = RopeBuffers {
                        positions: indices.view(),
                        queries: projected.view_mut(),
                        q: range(0, model.num_heads),
                        q_first: 0,
                        q_norm: norm(),
                        cache: Some(cache),
                        clip: None,
                    };
                    rope_into(&stream, &table, &mut buffers).unwrap();
                });
                bencher.iter_custom(|iterations| launches.time(&stream, iterations));
            });
        }
    }
    group.finish();
}
