//! The choice of experts: selection scores, group limit, top-k.

use std::cmp::Ordering;

use crate::{GroupScore, Routing, Score, reference::Real};

/// What the experts of one token are ranked by, `[E]`: never NaN.
pub(super) fn selection_scores<T: Real>(routing: &Routing, logits: &[T], scores: &[T], bias: Option<&[f32]>) -> Vec<T> {
    let group_sum = routing.group_limit().is_some_and(|limit| limit.score == GroupScore::Top2Sum);
    let monotone = bias.is_none() && !group_sum || routing.score() == Score::TopkSoftmax;
    let ranked = if monotone { logits } else { scores };
    let mut select: Vec<T> = ranked.to_vec();
    if let Some(bias) = bias {
        select.iter_mut().zip(bias).for_each(|(score, bias)| *score += T::of((*bias).into()));
    }
    for score in &mut select {
        if score.is_nan() {
            *score = T::NEG_INFINITY;
        }
    }
    if let Some(limit) = routing.group_limit() {
        let size = routing.num_experts() / limit.n_group;
        let group_scores: Vec<T> = select.chunks_exact(size).map(|group| group_score(limit.score, group)).collect();
        let mut best = vec![0; limit.topk_group];
        top(&group_scores, &mut best);
        for (group, scores) in select.chunks_exact_mut(size).enumerate() {
            if !best.contains(&(group as i32)) {
                scores.fill(T::NEG_INFINITY);
            }
        }
    }
    select
}

fn group_score<T: Real>(score: GroupScore, group: &[T]) -> T {
    let mut best = [T::NEG_INFINITY; 2];
    for value in group.iter().copied() {
        if value > best[0] {
            best = [value, best[0]];
        } else if value > best[1] {
            best[1] = value;
        }
    }
    match score {
        GroupScore::Max => best[0],
        // Infinities of both signs have no sum: such a group ranks last, as a NaN does among experts.
        GroupScore::Top2Sum if (best[0] + best[1]).is_nan() => T::NEG_INFINITY,
        GroupScore::Top2Sum => best[0] + best[1],
    }
}

/// Indices of the `top.len()` largest values, descending, ties to the lower index. The values hold no NaN.
pub(super) fn top<T: Real>(values: &[T], top: &mut [i32]) {
    let mut order: Vec<i32> = (0..values.len() as i32).collect();
    let rank = |a: &i32, b: &i32| {
        let (x, y) = (values[*a as usize], values[*b as usize]);
        y.partial_cmp(&x).unwrap_or(Ordering::Equal).then(a.cmp(b))
    };
    if top.len() < order.len() {
        order.select_nth_unstable_by(top.len(), rank);
        order.truncate(top.len());
    }
    order.sort_unstable_by(rank);
    top.copy_from_slice(&order);
}
