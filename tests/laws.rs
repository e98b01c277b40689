//! Laws that the reference keeps for any input, among them the ugly ones.

use anabranch::{
    Adaptive, Capacity, GroupLimit, GroupScore, Renormalize, Routing, Score,
    reference::{Activation, Expert, Linear, Matrix, MoeLayer, Permutation, combine, grouped_gemm, router},
};
use proptest::prelude::*;

/// Any valid routing of up to 48 experts.
fn routings() -> impl Strategy<Value = Routing> {
    let score = prop_oneof![Just(Score::Softmax), Just(Score::Sigmoid), Just(Score::TopkSoftmax)];
    let renormalize = prop_oneof![Just(Renormalize::None), Just(Renormalize::Sum)];
    let capacity = prop_oneof![
        3 => Just(None),
        1 => (0.1..2.0f64).prop_map(|factor| Some(Capacity::Factor(factor))),
        1 => (1..20usize).prop_map(|tokens| Some(Capacity::Tokens(tokens))),
    ];
    let adaptive = prop_oneof![2 => Just(Adaptive::Fixed), 1 => Just(Adaptive::Entropy)];
    let groups = (1..=6usize, 1..=8usize, any::<bool>());
    (groups, score, renormalize, capacity, adaptive, 0.1..4.0f32).prop_flat_map(
        |((n_group, size, limited), score, renormalize, capacity, adaptive, scale)| {
            (1..=n_group, any::<bool>()).prop_flat_map(move |(topk_group, sum)| {
                let reach = if limited { topk_group * size } else { n_group * size };
                (1..=reach.min(8)).prop_map(move |topk| {
                    let mut routing = Routing::builder(n_group * size, topk)
                        .score(score)
                        .renormalize(renormalize)
                        .scale(scale)
                        .adaptive(adaptive);
                    if limited {
                        let score = if sum && size > 1 { GroupScore::Top2Sum } else { GroupScore::Max };
                        routing = routing.group_limit(GroupLimit { n_group, topk_group, score });
                    }
                    if let Some(capacity) = capacity {
                        routing = routing.capacity(capacity);
                    }
                    routing.build().unwrap()
                })
            })
        },
    )
}

/// Logits with ties, NaN and infinities among them.
fn ugly() -> BoxedStrategy<f32> {
    prop_oneof![
        12 => -8.0..8.0f32,
        4 => (-3..3i32).prop_map(|tied| tied as f32),
        1 => Just(f32::NAN),
        1 => Just(f32::INFINITY),
        1 => Just(f32::NEG_INFINITY),
    ]
    .boxed()
}

fn routed(logit: BoxedStrategy<f32>) -> impl Strategy<Value = (Routing, usize, Vec<f32>, Option<Vec<f32>>)> {
    (routings(), 0..12usize).prop_flat_map(move |(routing, tokens)| {
        let experts = routing.num_experts();
        let bias = proptest::option::of(prop::collection::vec(-1.0..1.0f32, experts));
        (Just(routing), Just(tokens), prop::collection::vec(logit.clone(), tokens * experts), bias)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Ids are distinct and valid, counts add up, capacity holds, unused slots weigh nothing, and a token's NaN stays its own.
    #[test]
    fn routes_are_well_formed((routing, tokens, logits, bias) in routed(ugly())) {
        let out = router(&routing, &logits, bias.as_deref(), None).unwrap();
        let (experts, topk) = (routing.num_experts(), routing.topk());
        prop_assert_eq!(out.topk_ids.len(), tokens * topk);
        let mut counts = vec![0; experts];
        for token in 0..tokens {
            let ids = &out.topk_ids[token * topk..][..topk];
            let weights = &out.topk_weights[token * topk..][..topk];
            let row = &logits[token * experts..][..experts];
            for (slot, (&id, &weight)) in ids.iter().zip(weights).enumerate() {
                prop_assert!(id >= -1 && id < experts as i32);
                if id < 0 {
                    prop_assert!(weight == 0.0);
                    continue;
                }
                prop_assert!(!ids[..slot].contains(&id));
                counts[id as usize] += 1;
                let undefined = row.iter().any(|l| l.is_nan());
                prop_assert!(!undefined || weight.is_nan());
                let finite = row.iter().all(|l| l.is_finite());
                prop_assert!(!finite || (weight.is_finite() && weight >= 0.0));
            }
        }
        prop_assert_eq!(&counts, &out.expert_counts);
        if let Some(capacity) = routing.expert_capacity(tokens) {
            prop_assert!(counts.iter().all(|count| *count as usize <= capacity));
        } else if routing.adaptive() == Adaptive::Fixed {
            prop_assert!(out.topk_ids.iter().all(|id| *id >= 0));
        }
    }

    /// Without capacity, a token's route does not depend on who shares its batch.
    #[test]
    fn tokens_are_independent((routing, tokens, logits, bias) in routed(ugly())) {
        prop_assume!(routing.capacity().is_none());
        let (experts, topk) = (routing.num_experts(), routing.topk());
        let together = router(&routing, &logits, bias.as_deref(), None).unwrap();
        for token in 0..tokens {
            let alone = router(&routing, &logits[token * experts..][..experts], bias.as_deref(), None).unwrap();
            prop_assert_eq!(&alone.topk_ids, &together.topk_ids[token * topk..][..topk]);
            let same = alone.topk_weights.iter().zip(&together.topk_weights[token * topk..]).all(|(a, b)| a.to_bits() == b.to_bits());
            prop_assert!(same);
        }
    }

    /// The choice is the best one: no expert left out outranks one taken, and ties went to the lower id.
    #[test]
    fn the_best_are_chosen((routing, tokens, logits, bias) in routed((-8.0..8.0f32).boxed())) {
        prop_assume!(routing.capacity().is_none() && routing.adaptive() == Adaptive::Fixed);
        let (experts, topk) = (routing.num_experts(), routing.topk());
        let out = router(&routing, &logits, bias.as_deref(), None).unwrap();
        for token in 0..tokens {
            let row = &logits[token * experts..][..experts];
            let ids = &out.topk_ids[token * topk..][..topk];
            if bias.is_none() && routing.group_limit().is_none() {
                let worst = ids[topk - 1] as usize;
                for (expert, logit) in row.iter().enumerate() {
                    let taken = ids.contains(&(expert as i32));
                    let beats = *logit > row[worst] || (*logit == row[worst] && expert < worst);
                    prop_assert!(taken || !beats);
                }
            }
            if let Some(limit) = routing.group_limit() {
                let size = experts / limit.n_group;
                let mut groups: Vec<usize> = ids.iter().map(|id| *id as usize / size).collect();
                groups.sort_unstable();
                groups.dedup();
                prop_assert!(groups.len() <= limit.topk_group);
            }
        }
    }

    /// Renormalised weights sum to the scale, and so do those of a softmax over the chosen.
    #[test]
    fn weights_sum_to_the_scale((routing, tokens, logits, bias) in routed((-8.0..8.0f32).boxed())) {
        prop_assume!(routing.capacity().is_none());
        prop_assume!(routing.renormalize() == Renormalize::Sum || routing.score() == Score::TopkSoftmax);
        let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
        let out = router(&routing, &logits, bias.as_deref(), None).unwrap();
        for token in 0..tokens {
            let sum: f64 = out.topk_weights[token * routing.topk()..][..routing.topk()].iter().sum();
            prop_assert!((sum - f64::from(routing.scale())).abs() < 1e-9);
        }
    }

    /// A float32 softmax over many experts is as near to the true one as its roundings of single terms allow, 5 of `2^-24`: what is
    /// summed does not drift with the number of terms.
    #[test]
    fn a_softmax_over_many_experts_does_not_drift(
        mut logits in prop::collection::vec(-3.0..3.0f32, 512..=1024),
        lift in 4.0..10.0f32,
    ) {
        logits[0] += lift;
        let routing = Routing::builder(logits.len(), 1).build().unwrap();
        let wide: Vec<f64> = logits.iter().copied().map(f64::from).collect();
        let got = router(&routing, &logits, None, None).unwrap().topk_weights[0];
        let exact = router(&routing, &wide, None, None).unwrap().topk_weights[0];
        prop_assert!((f64::from(got) - exact).abs() < 5.0 * 2.0f64.powi(-24), "{got}, not {exact}");
    }

    /// Unpermute undoes permute, order within an expert is stable, and offsets frame the experts.
    #[test]
    fn permutation_round_trips((routing, tokens, logits, bias) in routed(ugly()), d in 0..5usize) {
        let (experts, topk) = (routing.num_experts(), routing.topk());
        let out = router(&routing, &logits, bias.as_deref(), None).unwrap();
        let permutation = Permutation::new(&out.topk_ids, topk, experts).unwrap();
        let x: Vec<f64> = (0..tokens * d).map(|i| i as f64 + 1.0).collect();
        let back = permutation.unpermute(&permutation.permute(&x, d).unwrap(), d).unwrap();
        for (slot, id) in out.topk_ids.iter().enumerate() {
            let expected = &x[slot / topk * d..][..d];
            let got = &back[slot * d..][..d];
            if *id >= 0 { prop_assert_eq!(got, expected) } else { prop_assert!(got.iter().all(|v| *v == 0.0)) }
        }
        for expert in 0..experts {
            let range = permutation.expert_offsets()[expert]..permutation.expert_offsets()[expert + 1];
            prop_assert_eq!(range.len(), out.expert_counts[expert] as usize);
            let slots = &permutation.slots()[range];
            prop_assert!(slots.is_sorted());
            prop_assert!(slots.iter().all(|slot| out.topk_ids[*slot] == expert as i32));
        }
    }
}

/// Deterministic values in [-1, 1).
fn noise(count: usize, mut state: u64) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as f32 / (1u64 << 30) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Fine-grained segmentation (DeepSeekMoE, section 3.1): an expert split along its width into m narrower ones that are always chosen
/// together, with the same weight, gives the same output.
#[test]
fn segmentation_changes_nothing() {
    let (tokens, d, n, experts, topk, m) = (9, 12, 24, 5, 2, 4);
    let x: Vec<f64> = noise(tokens * d, 1).into_iter().map(f64::from).collect();
    let logits: Vec<f64> = noise(tokens * experts, 2).into_iter().map(f64::from).collect();
    let (gate_up, down) = (noise(experts * 2 * n * d, 3), noise(experts * d * n, 4));
    let (gate_of, up_of) =
        (|e: usize| &gate_up[e * 2 * n * d..][..n * d], |e: usize| &gate_up[(e * 2 + 1) * n * d..][..n * d]);
    let whole: Vec<Expert<'_>> = (0..experts)
        .map(|e| {
            let gate_up = Matrix::from_f32(2 * n, d, &gate_up[e * 2 * n * d..][..2 * n * d]).unwrap();
            Expert::swiglu_stacked(gate_up, Matrix::from_f32(d, n, &down[e * d * n..][..d * n]).unwrap()).unwrap()
        })
        .collect();
    let routing = Routing::builder(experts, topk).renormalize(Renormalize::Sum).build().unwrap();
    let routed = router(&routing, &logits, None, None).unwrap();
    let permutation = Permutation::new(&routed.topk_ids, topk, experts).unwrap();
    let y = grouped_gemm(&x, d, &whole, &permutation).unwrap();
    let expected = combine(&y, &routed.topk_weights, &permutation, d).unwrap();

    // Segment s of an expert has rows s * n/m.. of gate and up, and the same columns of down.
    let width = n / m;
    let narrow_down: Vec<Vec<f32>> = (0..experts * m)
        .map(|i| {
            let (e, s) = (i / m, i % m);
            (0..d).flat_map(|row| down[(e * d + row) * n + s * width..][..width].to_vec()).collect()
        })
        .collect();
    let narrow: Vec<Expert<'_>> = (0..experts * m)
        .map(|i| {
            let (e, s) = (i / m, i % m);
            Expert::SwiGlu {
                gate: Matrix::from_f32(width, d, &gate_of(e)[s * width * d..][..width * d]).unwrap().into(),
                up: Matrix::from_f32(width, d, &up_of(e)[s * width * d..][..width * d]).unwrap().into(),
                down: Matrix::from_f32(d, width, &narrow_down[i]).unwrap().into(),
            }
        })
        .collect();
    let ids: Vec<i32> = routed.topk_ids.iter().flat_map(|id| (0..m as i32).map(move |s| id * m as i32 + s)).collect();
    let weights: Vec<f64> = routed.topk_weights.iter().flat_map(|weight| [*weight; 4]).collect();
    let permutation = Permutation::new(&ids, topk * m, experts * m).unwrap();
    let y = grouped_gemm(&x, d, &narrow, &permutation).unwrap();
    let got = combine(&y, &weights, &permutation, d).unwrap();
    assert!(expected.iter().zip(&got).all(|(a, b)| (a - b).abs() < 1e-12));
    assert!(expected.iter().any(|v| v.abs() > 0.1), "the law says nothing about zeros");
}

/// A layer on one token alone gives what it gives in a batch, and a NaN in one token's input reaches only its own output.
#[test]
fn layers_keep_tokens_apart() {
    let (tokens, d, n, experts) = (7, 16, 8, 4);
    let (gate, up, down) = (noise(experts * d, 1), noise(experts * n * d, 2), noise(experts * d * n, 3));
    let bias = noise(n, 4);
    let layer = MoeLayer {
        routing: Routing::builder(experts, 2).build().unwrap(),
        gate: Matrix::from_f32(experts, d, &gate).unwrap().into(),
        selection_bias: None,
        experts: (0..experts)
            .map(|e| Expert::Plain {
                activation: Activation::Gelu,
                up: Linear { weight: Matrix::from_f32(n, d, &up[e * n * d..][..n * d]).unwrap(), bias: Some(&bias) },
                down: Matrix::from_f32(d, n, &down[e * d * n..][..d * n]).unwrap().into(),
            })
            .collect(),
        shared: None,
    };
    let mut x = noise(tokens * d, 5);
    let together = layer.forward(&x, None).unwrap();
    for token in 0..tokens {
        let alone = layer.forward(&x[token * d..][..d], None).unwrap();
        let off = alone.y.iter().zip(&together.y[token * d..]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-5, "token {token} differs by {off}");
    }
    assert_eq!(layer.forward(&x, None).unwrap().y, together.y, "the same call gives the same bits");
    x[3 * d + 5] = f32::NAN;
    let poisoned = layer.forward(&x, None).unwrap();
    for token in 0..tokens {
        let (a, b) = (&poisoned.y[token * d..][..d], &together.y[token * d..][..d]);
        if token == 3 {
            assert!(a.iter().all(|v| v.is_nan()));
        } else {
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5));
        }
    }
    assert!(layer.forward::<f32>(&[], None).unwrap().y.is_empty());
}
