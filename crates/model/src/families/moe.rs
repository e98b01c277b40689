//! Experts, routers and which layers have them, as families describe them.

use std::collections::HashSet;

use anabranch::{GroupLimit, GroupScore, MAX_EXPERTS, MAX_TOPK, Renormalize, Routing, Score};

use super::{Base, MAX_WIDTH};
use crate::{
    Result,
    config::{FeedForward, SharedExperts, json::Object},
};

/// The names under which files give the number of routed experts: the published ones, and what newer saves rename
/// them to.
const NUM_EXPERTS: [&str; 3] = ["n_routed_experts", "num_local_experts", "num_experts"];

/// What a family fixes about its router.
pub(super) struct RouterRules {
    pub(super) score: Score,
    pub(super) renormalize: bool,
    pub(super) scale: f32,
    pub(super) groups: Option<GroupLimit>,
}

/// Experts and experts per token.
pub(super) fn routing(object: &Object<'_>, rules: &RouterRules) -> Result<Routing> {
    let num_experts = num_experts(object)?;
    let topk = object.size("num_experts_per_tok", 1..=MAX_TOPK)?;
    if topk > num_experts {
        return Err(object
            .error(format!("num_experts_per_tok must be at most the number of experts ({num_experts}), got {topk}")));
    }
    let renormalize = if rules.renormalize { Renormalize::Sum } else { Renormalize::None };
    let mut builder =
        Routing::builder(num_experts, topk).score(rules.score).renormalize(renormalize).scale(rules.scale);
    if let Some(groups) = rules.groups {
        check_groups(object, num_experts, topk, groups)?;
        builder = builder.group_limit(groups);
    }
    builder.build().map_err(|error| object.error(error))
}

fn num_experts(object: &Object<'_>) -> Result<usize> {
    let mut found: Option<(&str, usize)> = None;
    for key in NUM_EXPERTS {
        let Some(count) = object.optional_size(key, &(1..=MAX_EXPERTS))? else { continue };
        match found {
            Some((other, others)) if others != count => {
                return Err(object.error(format!("{key} must equal {other} ({others}), got {count}")));
            }
            _ => found = Some((key, count)),
        }
    }
    found.map(|(_, count)| count).ok_or_else(|| {
        object.missing(NUM_EXPERTS[0], "the number of routed experts (num_local_experts or num_experts do as well)")
    })
}

/// Reads `n_group` and `topk_group`. One group is no limit.
pub(super) fn groups(object: &Object<'_>, score: GroupScore, default: Option<usize>) -> Result<Option<GroupLimit>> {
    let range = 1..=MAX_EXPERTS;
    let read = |key| match (object.optional_size(key, &range)?, default) {
        (Some(value), _) | (None, Some(value)) => Ok(value),
        (None, None) => object.size(key, range.clone()),
    };
    let (n_group, topk_group) = (read("n_group")?, read("topk_group")?);
    if topk_group > n_group {
        return Err(object.error(format!("topk_group must be at most n_group ({n_group}), got {topk_group}")));
    }
    Ok((n_group > 1).then_some(GroupLimit { n_group, topk_group, score }))
}

/// What [`Routing`] checks as well, here in the file's own words.
fn check_groups(object: &Object<'_>, num_experts: usize, topk: usize, limit: GroupLimit) -> Result<()> {
    let GroupLimit { n_group, topk_group, score } = limit;
    if !num_experts.is_multiple_of(n_group) {
        return Err(object.error(format!("n_group must divide the number of experts ({num_experts}), got {n_group}")));
    }
    let size = num_experts / n_group;
    if score == GroupScore::Top2Sum && size < 2 {
        return Err(object.error(format!(
            "n_group must leave at least 2 of the {num_experts} experts in a group, got {n_group} groups"
        )));
    }
    if topk > topk_group * size {
        return Err(object.error(format!(
            "num_experts_per_tok must be at most {}, the experts of topk_group ({topk_group}) groups, got {topk}",
            topk_group * size
        )));
    }
    Ok(())
}

/// DeepSeek's and GLM's shared experts: `n_shared_experts` of the routed experts' width, stored as one.
pub(super) fn shared(object: &Object<'_>, expert_width: usize) -> Result<Option<SharedExperts>> {
    let count = object.optional_size("n_shared_experts", &(0..=MAX_EXPERTS))?.unwrap_or(0);
    let intermediate_size = count * expert_width;
    if intermediate_size > MAX_WIDTH {
        return Err(object.error(format!(
            "n_shared_experts * moe_intermediate_size must be at most {MAX_WIDTH}, got {intermediate_size}"
        )));
    }
    Ok((count > 0).then_some(SharedExperts { intermediate_size, gated: false }))
}

/// DeepSeek's rule: dense before `first_k_dense_replace`, then MoE in every `moe_layer_freq`-th layer.
pub(super) fn layers_after_first(object: &Object<'_>, base: &Base) -> Result<Vec<FeedForward>> {
    let first = object.size("first_k_dense_replace", 0..=base.num_layers)?;
    let every = object.optional_size("moe_layer_freq", &(1..=base.num_layers.max(1)))?.unwrap_or(1);
    Ok(kinds(base, |layer| layer >= first && layer.is_multiple_of(every)))
}

/// Qwen's rule: MoE in every `decoder_sparse_step`-th layer, counted from one, except `mlp_only_layers`.
pub(super) fn layers_by_step(object: &Object<'_>, base: &Base) -> Result<Vec<FeedForward>> {
    let step = object.optional_size("decoder_sparse_step", &(1..=MAX_WIDTH))?.unwrap_or(1);
    let dense: HashSet<usize> = object.sizes("mlp_only_layers", &(0..=MAX_WIDTH))?.into_iter().collect();
    Ok(kinds(base, |layer| (layer + 1).is_multiple_of(step) && !dense.contains(&layer)))
}

fn kinds(base: &Base, is_moe: impl Fn(usize) -> bool) -> Vec<FeedForward> {
    (0..base.num_layers).map(|layer| if is_moe(layer) { FeedForward::Moe } else { FeedForward::Dense }).collect()
}
