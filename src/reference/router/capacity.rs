//! Capacity: an expert accepts only so many tokens (GShard, arXiv 2006.16668, algorithm 1).

use crate::reference::Real;

/// Drops what comes too late: slot 0 of every token is placed before any slot 1, tokens in order. A dropped slot gets id
/// -1 and weight 0; the other weights of its token stay.
pub(super) fn drop_overflow<T: Real>(
    capacity: usize,
    num_experts: usize,
    topk: usize,
    ids: &mut [i32],
    weights: &mut [T],
) {
    let mut used = vec![0; num_experts];
    for slot in 0..topk {
        for at in (slot..ids.len()).step_by(topk) {
            if ids[at] < 0 {
                continue;
            }
            let count = &mut used[ids[at] as usize];
            if *count < capacity {
                *count += 1;
            } else {
                ids[at] = -1;
                weights[at] = T::ZERO;
            }
        }
    }
}
