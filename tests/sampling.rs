//! The laws of drawing a token.

use anabranch::{
    Error, Sampling, SamplingBuilder,
    reference::{Candidate, candidates, sample},
};
use proptest::prelude::*;

fn build(builder: SamplingBuilder) -> Sampling {
    builder.build().expect("valid settings")
}

fn plain() -> Sampling {
    build(Sampling::builder())
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// The formula, written out once more.
fn softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
    let powers: Vec<f64> = logits.iter().map(|&z| (f64::from(z) / temperature).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| power / sum).collect()
}

fn ids(candidates: &[Candidate]) -> Vec<u32> {
    candidates.iter().map(|candidate| candidate.id).collect()
}

/// Few distinct values, so that ties are common.
fn logits() -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![
        prop::collection::vec(-8.0f32..8.0, 1..40),
        prop::collection::vec((-3i8..3).prop_map(f32::from), 1..40),
        prop::collection::vec(prop_oneof![Just(f32::NEG_INFINITY), Just(0.0), Just(-0.0), Just(1.0)], 1..40)
            .prop_filter("something to draw", |row| row.iter().any(|&z| z > f32::NEG_INFINITY)),
    ]
}

proptest! {
    #[test]
    fn greedy_is_the_first_maximum(row in logits(), u in 0.0f64..1.0) {
        prop_assert_eq!(sample(&Sampling::greedy(), &row, &[], u).unwrap(), argmax(&row));
    }

    #[test]
    fn top_1_is_greedy(row in logits(), u in 0.0f64..1.0, temperature in 0.01f32..4.0) {
        let sampling = build(Sampling::builder().top_k(1).temperature(temperature));
        prop_assert_eq!(sample(&sampling, &row, &[], u).unwrap(), argmax(&row));
    }

    #[test]
    fn candidates_are_the_softmax_in_falling_order(row in logits(), temperature in 0.2f32..4.0) {
        let found = candidates(&build(Sampling::builder().temperature(temperature)), &row, &[]).unwrap();
        let expected = softmax(&row, f64::from(temperature));
        prop_assert!((found.iter().map(|c| c.probability).sum::<f64>() - 1.0).abs() < 1e-12);
        for pair in found.windows(2) {
            let tied = row[pair[0].id as usize] == row[pair[1].id as usize];
            prop_assert!(row[pair[0].id as usize] > row[pair[1].id as usize] || (tied && pair[0].id < pair[1].id));
        }
        for candidate in &found {
            prop_assert!((candidate.probability - expected[candidate.id as usize]).abs() < 1e-12);
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_p(row in logits(), top_p in 0.01f32..1.0) {
        let all = candidates(&plain(), &row, &[]).unwrap();
        let kept = candidates(&build(Sampling::builder().top_p(top_p)), &row, &[]).unwrap();
        let mass = |n: usize| all[..n].iter().map(|c| c.probability).sum::<f64>();
        prop_assert_eq!(ids(&kept), ids(&all[..kept.len()]));
        prop_assert!(mass(kept.len()) >= f64::from(top_p) - 1e-12);
        prop_assert!(mass(kept.len() - 1) < f64::from(top_p) + 1e-12);
    }

    #[test]
    fn min_p_keeps_what_is_near_the_best(row in logits(), min_p in 0.0f32..0.99) {
        let all = candidates(&plain(), &row, &[]).unwrap();
        let kept = candidates(&build(Sampling::builder().min_p(min_p)), &row, &[]).unwrap();
        let threshold = f64::from(min_p) * all[0].probability;
        prop_assert_eq!(ids(&kept), ids(&all[..kept.len()]));
        prop_assert!(kept.len() == all.len() || all[kept.len()].probability < threshold * (1.0 + 1e-12));
        prop_assert!(all[kept.len() - 1].probability >= threshold * (1.0 - 1e-12));
    }

    #[test]
    fn top_k_keeps_exactly_k_and_precedes_top_p(row in logits(), top_k in 1usize..50, top_p in 0.01f32..=1.0) {
        let all = candidates(&plain(), &row, &[]).unwrap();
        let best = candidates(&build(Sampling::builder().top_k(top_k)), &row, &[]).unwrap();
        prop_assert_eq!(ids(&best), ids(&all[..top_k.min(row.len())]));
        // The nucleus is that of the tokens left: as if the others had never been there.
        let both = candidates(&build(Sampling::builder().top_k(top_k).top_p(top_p)), &row, &[]).unwrap();
        let mut alone = vec![f32::NEG_INFINITY; row.len()];
        for candidate in &best {
            alone[candidate.id as usize] = row[candidate.id as usize];
        }
        let nucleus = candidates(&build(Sampling::builder().top_p(top_p)), &alone, &[]).unwrap();
        if top_p < 0.999 {
            prop_assert_eq!(ids(&both), ids(&nucleus));
        }
    }

    #[test]
    fn a_masked_token_is_never_drawn(row in logits(), u in 0.0f64..1.0) {
        let id = sample(&plain(), &row, &[], u).unwrap();
        prop_assert!(row[id as usize] > f32::NEG_INFINITY);
    }

    #[test]
    fn temperature_to_zero_is_greedy(row in prop::collection::vec(-8.0f32..8.0, 1..40), u in 0.0f64..1.0) {
        let sampling = build(Sampling::builder().temperature(1e-30));
        let drawn = sample(&sampling, &row, &[], u).unwrap();
        prop_assert_eq!(row[drawn as usize], row[argmax(&row) as usize]);
    }
}

#[test]
fn draws_over_a_grid_follow_the_probabilities() {
    let row = [1.0, -0.5, 2.0, 0.0, 2.0];
    let draws = 100_000;
    let mut counts = [0usize; 5];
    for step in 0..draws {
        let u = (f64::from(step) + 0.5) / f64::from(draws);
        counts[sample(&plain(), &row, &[], u).unwrap() as usize] += 1;
    }
    for (count, expected) in counts.iter().zip(softmax(&row, 1.0)) {
        assert!((*count as f64 - expected * f64::from(draws)).abs() <= 2.0, "{counts:?}");
    }
}

#[test]
fn the_penalty_divides_positive_and_multiplies_negative_logits_once() {
    let sampling = build(Sampling::builder().repetition_penalty(2.0));
    let seen = [0, 1, 0, 0, 3];
    let found = candidates(&sampling, &[3.0, -1.0, 1.0, 0.0], &seen).unwrap();
    let expected = softmax(&[1.5, -2.0, 1.0, 0.0], 1.0);
    assert_eq!(ids(&found), [0, 2, 3, 1]);
    for candidate in found {
        assert!((candidate.probability - expected[candidate.id as usize]).abs() < 1e-12);
    }
    // Greedy choice is penalised too, as in Transformers.
    let greedy = build(Sampling::builder().temperature(0.0).repetition_penalty(4.0));
    assert_eq!(sample(&greedy, &[3.0, 1.0], &[0], 0.0).unwrap(), 1);
}

#[test]
fn extreme_logits_do_not_overflow() {
    let row = [f32::MAX, f32::MIN, 0.0];
    let sampling = build(Sampling::builder().temperature(f32::MIN_POSITIVE).repetition_penalty(f32::MIN_POSITIVE));
    let found = candidates(&sampling, &row, &[0, 1]).unwrap();
    assert_eq!(found[0], Candidate { id: 0, probability: 1.0 });
    assert_eq!(sample(&sampling, &row, &[], 1.0 - f64::EPSILON).unwrap(), 0);
}

#[test]
fn what_cannot_be_drawn_from_is_an_error() {
    let message = |row: &[f32]| sample(&Sampling::greedy(), row, &[], 0.0).unwrap_err().to_string();
    let rows = [f32::NAN, f32::INFINITY].map(|bad| message(&[0.0, bad]));
    assert_eq!(rows[0], "sampling: logits must be free of NaN and plus infinity, got NaN for token 1");
    assert_eq!(rows[1], "sampling: logits must be free of NaN and plus infinity, got inf for token 1");
    let masked = "sampling: logits must be above minus infinity for at least one token, got minus infinity for all";
    assert_eq!(message(&[f32::NEG_INFINITY; 3]), masked);
    assert!(matches!(sample(&plain(), &[], &[], 0.0), Err(Error::Shape { .. })));
    let penalised = build(Sampling::builder().repetition_penalty(1.1));
    assert!(matches!(sample(&penalised, &[0.0; 4], &[4], 0.0), Err(Error::Index { limit: 4, got: 4, .. })));
    for u in [-0.1, 1.0, f64::NAN] {
        assert!(matches!(sample(&plain(), &[0.0], &[], u), Err(Error::Setting { setting: "u", .. })));
    }
}
