//! A router alone: which experts six tokens would visit under four published rules.
//!
//!     cargo run --example route

use anabranch::{GroupLimit, GroupScore, Renormalize, Result, Routing, Score, reference::router};

fn main() -> Result<()> {
    let (experts, topk) = (16, 4);
    let groups = |score| GroupLimit { n_group: 4, topk_group: 2, score };
    let rules = [
        ("DeepSeekMoE: softmax, top-k", Routing::builder(experts, topk)),
        ("Mixtral: the same, renormalised", Routing::builder(experts, topk).renormalize(Renormalize::Sum)),
        (
            "DeepSeek-V2: two of four groups by their best, scaled",
            Routing::builder(experts, topk).group_limit(groups(GroupScore::Max)).scale(16.0),
        ),
        (
            "DeepSeek-V3: sigmoid, two of four groups by their two best, renormalised, scaled",
            Routing::builder(experts, topk)
                .score(Score::Sigmoid)
                .renormalize(Renormalize::Sum)
                .group_limit(groups(GroupScore::Top2Sum))
                .scale(2.5),
        ),
    ];
    // Any function of (token, expert) that is not monotone serves as logits.
    let logits: Vec<f32> = (0..6 * experts).map(|i| 2.0 * (i as f32 * 1.7).sin() + (i as f32 * 0.3).cos()).collect();
    for (name, rule) in rules {
        let routing = rule.build()?;
        let out = router(&routing, &logits, None, None)?;
        println!("{name}");
        for (ids, weights) in out.topk_ids.chunks(topk).zip(out.topk_weights.chunks(topk)) {
            let visits: Vec<String> = ids.iter().zip(weights).map(|(id, w)| format!("{id:2} x {w:.3}")).collect();
            println!("  {}", visits.join("   "));
        }
        println!("  tokens per expert {:?}\n", out.expert_counts);
    }
    Ok(())
}
