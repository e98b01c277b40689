//! The router at DeepSeek-V3's and Qwen3-30B-A3B's shapes.

use anabranch::{GroupLimit, GroupScore, Renormalize, Routing, Score, reference::router};
use criterion::{Criterion, Throughput};

pub(crate) fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("router");
    let tokens = 1024;
    let limit = GroupLimit { n_group: 8, topk_group: 4, score: GroupScore::Top2Sum };
    let deepseek_v3 = Routing::builder(256, 8).score(Score::Sigmoid).renormalize(Renormalize::Sum).group_limit(limit);
    let qwen3 = Routing::builder(128, 8).renormalize(Renormalize::Sum);
    for (name, routing) in [("deepseek_v3", deepseek_v3), ("qwen3", qwen3)] {
        let routing = routing.build().expect("a published routing");
        let logits = super::noise(tokens * routing.num_experts(), 1);
        group.throughput(Throughput::Elements(tokens as u64));
        group.bench_function(name, |bencher| bencher.iter(|| router(&routing, &logits, None, None)));
    }
    group.finish();
}
