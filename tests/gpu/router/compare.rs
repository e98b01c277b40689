//! Whether a result is the reference's.
//!
//! Weights agree within 1e-6 (times the routed scaling factor where that is above 1). That is what the roundings come to for a
//! softmax over 1,024 experts, in which the largest weight, w = 1/S, moves most:
//!
//! - ten additions to S, one upon another: `10 * 2^-24 w`, 6.0e-7 at w = 1;
//! - the terms of S but the largest, which is exactly 1: `2^-22` for exp itself and `2.25 * 2^-24 |x|` for its argument x, together
//!   `w^2 (2^-22 (S - 1) + 2.25 * 2^-24 sum |x| e^x)`. That sum is at most `(S - 1) ln(1023 / (S - 1))`, so that this is at most
//!   3.0e-7, near S = 2, and 0 at w = 1;
//! - reciprocal, product and scaling, `2^-22 w`, and the reference's own, `2^-23 w`: 3.6e-7 at w = 1.
//!
//! Their sum is largest near S = 1.14 and stays below 1e-6 there, were every rounding as large as it can be and in the same direction.
//!
//! Ids are equal wherever experts are ranked by logits. Where they are ranked by scores, exp is rounded differently here and there: ids
//! may then differ between two experts whose selection scores, in float64, differ by less than the two roundings allow, which is
//! `2^-23 (|x| + 8 + sqrt(E)/8)` of the larger score plus `2^-22` of the larger sum of score and bias, x being the exponent: for
//! exponents below 8, 18 units in the last place of the score. The same goes for two groups' scores.

use anabranch::{Adaptive, GroupScore, Renormalize, Routing, Score, reference};

/// A router's result on the host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Routed {
    pub(crate) ids: Vec<i32>,
    pub(crate) weights: Vec<f32>,
    pub(crate) counts: Vec<u32>,
}

/// What the router was given.
pub(crate) struct Inputs<'a> {
    pub(crate) logits: &'a [f32],
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) complexity: Option<&'a [f32]>,
}

/// Checks a result without capacity against the reference, every element of it.
pub(crate) fn check(routing: &Routing, inputs: &Inputs<'_>, got: &Routed) -> Result<(), String> {
    let expected = reference::router(routing, inputs.logits, inputs.bias, inputs.complexity).unwrap();
    let (experts, topk) = (routing.num_experts(), routing.topk());
    if got.ids.len() != expected.topk_ids.len() || got.counts != count(experts, &got.ids) {
        return Err(format!("the counts are not those of the ids: {:?}", got.counts));
    }
    for (token, logits) in inputs.logits.chunks_exact(experts).enumerate() {
        let part = token * topk..(token + 1) * topk;
        let (ids, weights) = (&got.ids[part.clone()], &got.weights[part.clone()]);
        let (expected_ids, expected_weights) = (&expected.topk_ids[part.clone()], &expected.topk_weights[part]);
        let fail = |what: String| {
            Err(format!(
                "token {token}: {what}\n got {ids:?} {weights:?}\n not {expected_ids:?} {expected_weights:?}\n {routing:?}"
            ))
        };
        let used = ids.iter().take_while(|id| **id >= 0).count();
        let expected_used = expected_ids.iter().take_while(|id| **id >= 0).count();
        if ids[used..].iter().any(|id| *id != -1) || weights[used..].iter().any(|weight| *weight != 0.0) {
            return fail("an unused slot is not -1 and 0".to_owned());
        }
        if used != expected_used && !slots_may_differ(routing, logits) {
            return fail(format!("{used} slots, not {expected_used}"));
        }
        if used != expected_used || ids != expected_ids {
            if let Err(what) = may_differ(routing, logits, inputs.bias, ids, expected_ids) {
                return fail(what);
            }
        } else if let Some(slot) = (0..topk).find(|slot| !close(routing, weights[*slot], expected_weights[*slot])) {
            return fail(format!("the weight of slot {slot} differs"));
        }
        let exact = weights_of(routing, logits, &ids[..used]);
        if let Some(slot) = (0..used).find(|slot| !close(routing, weights[*slot], exact[*slot])) {
            return fail(format!("the weight of slot {slot} is not {}", exact[slot]));
        }
    }
    Ok(())
}

/// Applies a capacity to a result without one: slot 0 of every token before slot 1 of any.
pub(crate) fn drop_overflow(routing: &Routing, capacity: usize, routed: &Routed) -> Routed {
    let (experts, topk) = (routing.num_experts(), routing.topk());
    let mut dropped = routed.clone();
    let mut used = vec![0; experts];
    for slot in 0..topk {
        for at in (slot..dropped.ids.len()).step_by(topk).filter(|at| routed.ids[*at] >= 0) {
            let place: &mut usize = &mut used[routed.ids[at] as usize];
            *place += 1;
            if *place > capacity {
                (dropped.ids[at], dropped.weights[at]) = (-1, 0.0);
            }
        }
    }
    dropped.counts = count(experts, &dropped.ids);
    dropped
}

pub(crate) fn count(experts: usize, ids: &[i32]) -> Vec<u32> {
    let mut counts = vec![0; experts];
    ids.iter().filter(|id| **id >= 0).for_each(|id| counts[*id as usize] += 1);
    counts
}

fn close(routing: &Routing, got: f32, expected: f32) -> bool {
    if expected.is_nan() || got.is_nan() {
        return expected.is_nan() && got.is_nan();
    }
    (got - expected).abs() <= 1e-6 * routing.scale().max(1.0)
}

/// The weights of these experts, in float64.
fn weights_of(routing: &Routing, logits: &[f32], ids: &[i32]) -> Vec<f32> {
    let wide: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
    let scores = match routing.score() {
        Score::TopkSoftmax => {
            let chosen: Vec<f64> = ids.iter().map(|id| wide[*id as usize]).collect();
            reference::scores(Score::Softmax, &chosen)
        }
        score => {
            let scores = reference::scores(score, &wide);
            ids.iter().map(|id| scores[*id as usize]).collect()
        }
    };
    let poison = if logits.iter().any(|logit| logit.is_nan()) { f64::NAN } else { 1.0 };
    let renormalized = routing.renormalize() == Renormalize::Sum && routing.score() != Score::TopkSoftmax;
    let sum = if renormalized { scores.iter().sum::<f64>() + 1e-20 } else { 1.0 };
    scores.iter().map(|score| (poison * score / sum * f64::from(routing.scale())) as f32).collect()
}

/// Whether the entropy is so near to a whole number of slots that rounding decides.
fn slots_may_differ(routing: &Routing, logits: &[f32]) -> bool {
    if routing.adaptive() != Adaptive::Entropy || routing.num_experts() < 2 {
        return false;
    }
    let wide: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
    let scores = reference::scores(Score::Softmax, &wide);
    let entropy: f64 = scores.iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum();
    let slots = entropy / (logits.len() as f64).ln() * routing.topk() as f64;
    (slots - slots.round()).abs() < 1e-4
}

/// Ids that differ from the reference's: valid ones, and only where selection scores are as good as equal.
fn may_differ(
    routing: &Routing,
    logits: &[f32],
    bias: Option<&[f32]>,
    ids: &[i32],
    expected: &[i32],
) -> Result<(), String> {
    let mut sorted: Vec<i32> = ids.iter().copied().filter(|id| *id >= 0).collect();
    sorted.sort_unstable();
    let valid = sorted.iter().all(|id| (*id as usize) < logits.len()) && sorted.is_sorted_by(|a, b| a < b);
    if !valid {
        return Err("ids are out of range or repeated".to_owned());
    }
    let group_sum = routing.group_limit().is_some_and(|limit| limit.score == GroupScore::Top2Sum);
    let both = ids.iter().zip(expected).filter(|(got, expected)| **got >= 0 && **expected >= 0 && got != expected);
    let mut differing = both.peekable();
    if differing.peek().is_none() {
        return Ok(());
    }
    if routing.score() == Score::TopkSoftmax || bias.is_none() && !group_sum {
        return Err("experts ranked by logits must come in the same order".to_owned());
    }
    let select = Selection::of(routing, logits, bias);
    if select.groups_may_differ(routing) {
        return Ok(());
    }
    for (got, expected) in differing {
        let (a, b) = (*got as usize, *expected as usize);
        if (select.score[a] - select.score[b]).abs() > select.slack[a].max(select.slack[b]) {
            return Err(format!(
                "{got} is chosen where {expected} belongs: {} and {}",
                select.score[a], select.score[b]
            ));
        }
    }
    Ok(())
}

/// Selection scores in float64, and how far rounding may move them.
struct Selection {
    score: Vec<f64>,
    slack: Vec<f64>,
}

impl Selection {
    fn of(routing: &Routing, logits: &[f32], bias: Option<&[f32]>) -> Self {
        let wide: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
        let max = wide.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let scores = reference::scores(routing.score(), &wide);
        let unit = f64::from(f32::EPSILON);
        let mut selection = Self { score: Vec::new(), slack: Vec::new() };
        for (expert, (score, logit)) in scores.into_iter().zip(wide).enumerate() {
            let exponent = if routing.score() == Score::Sigmoid { logit.abs() } else { max - logit };
            let bias = bias.map_or(0.0, |bias| f64::from(bias[expert]));
            let sum = if (score + bias).is_nan() { f64::NEG_INFINITY } else { score + bias };
            let relative = exponent.min(200.0) + 8.0 + (logits.len() as f64).sqrt() / 8.0;
            let finite = |value: f64| if value.is_finite() { value.abs() } else { 0.0 };
            selection.score.push(sum);
            selection.slack.push(unit * (relative * finite(score) + 2.0 * finite(bias)) + f64::from(f32::MIN_POSITIVE));
        }
        selection
    }

    /// Whether the last chosen group and the best other one are as good as equal.
    fn groups_may_differ(&self, routing: &Routing) -> bool {
        let Some(limit) = routing.group_limit() else { return false };
        let size = routing.num_experts() / limit.n_group;
        let mut groups: Vec<(f64, f64)> =
            self.score.chunks_exact(size).zip(self.slack.chunks_exact(size)).map(group(limit.score)).collect();
        groups.sort_by(|a, b| b.0.total_cmp(&a.0));
        let Some(next) = groups.get(limit.topk_group) else { return false };
        let last = groups[limit.topk_group - 1];
        (last.0 - next.0).abs() <= last.1 + next.1
    }
}

/// A group's score and how far rounding may move it.
fn group(score: GroupScore) -> impl Fn((&[f64], &[f64])) -> (f64, f64) {
    move |(scores, slack)| {
        let mut sorted = scores.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let slack = slack.iter().copied().fold(0.0, f64::max);
        match score {
            GroupScore::Top2Sum => (sorted[0] + sorted[1], 2.0 * slack),
            _ => (sorted[0], slack),
        }
    }
}
