//! What a router does, as one validated value.

use crate::{Error, Result};

/// Most experts a routing may have.
pub const MAX_EXPERTS: usize = 1024;
/// Most experts a token may visit.
pub const MAX_TOPK: usize = 32;

/// How logits become scores. The scores rank the experts and are the weights of the chosen ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Score {
    /// Softmax over all experts, then top-k (DeepSeekMoE eq. 11, GShard, Switch, Mixtral, Qwen, OLMoE).
    Softmax,
    /// Sigmoid of each logit, then top-k (DeepSeek-V3 eq. 15).
    Sigmoid,
    /// Top-k of the logits, then softmax over the chosen only (gpt-oss). Equal to [`Score::Softmax`] with
    /// [`Renormalize::Sum`] in exact arithmetic.
    TopkSoftmax,
}

/// What happens to the chosen experts' scores before they are scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Renormalize {
    /// They stay as they are (DeepSeekMoE V1, OLMoE, Switch).
    #[default]
    None,
    /// They are divided by their sum + 1e-20, so that a token's weights sum to one (DeepSeek-V3, Mixtral, Qwen3, GShard).
    Sum,
}

/// How a group of experts is scored in group-limited routing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum GroupScore {
    /// The best selection score in the group (DeepSeek-V2's `group_limited_greedy`).
    Max,
    /// The sum of the two best (DeepSeek-V3's `noaux_tc`); a group must have at least two experts.
    Top2Sum,
}

/// Group-limited routing: experts are split into `n_group` equal, contiguous groups, and a token may only choose
/// from the `topk_group` best of them. Experts of other groups are masked with minus infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimit {
    /// Number of groups; divides the number of experts.
    pub n_group: usize,
    /// Groups a token may choose from.
    pub topk_group: usize,
    /// How a group is scored.
    pub score: GroupScore,
}

/// How many tokens an expert accepts; later ones are dropped (id -1, weight 0). Slot 0 of every token is placed
/// before slot 1 of any, tokens in order (GShard, algorithm 1; Switch).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Capacity {
    /// `ceil(T * K / E * factor)` tokens.
    Factor(f64),
    /// This many tokens.
    Tokens(usize),
}

/// How many of the `topk` slots a token uses. `k_t = clamp(floor(complexity_t * topk), 1, topk)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Adaptive {
    /// All of them.
    #[default]
    Fixed,
    /// The complexity, in [0, 1], is given for each token.
    Complexity,
    /// The complexity is the entropy of `softmax(logits)` divided by `ln E`; 0 if there is one expert.
    Entropy,
}

/// A router's rule: how logits become expert ids and weights. Built with [`Routing::builder`], validated once there.
///
/// A selection bias (DeepSeek-V3's `e_score_correction_bias`) is data, not rule: it is an argument of the router.
///
/// ```
/// use anabranch::{GroupLimit, GroupScore, Renormalize, Routing, Score};
/// // DeepSeek-V3
/// let routing = Routing::builder(256, 8)
///     .score(Score::Sigmoid)
///     .renormalize(Renormalize::Sum)
///     .scale(2.5)
///     .group_limit(GroupLimit { n_group: 8, topk_group: 4, score: GroupScore::Top2Sum })
///     .build()?;
/// assert_eq!(routing.num_experts(), 256);
/// // nine experts cannot be chosen from one group of eight
/// let too_many = GroupLimit { n_group: 8, topk_group: 1, score: GroupScore::Max };
/// assert!(Routing::builder(64, 9).group_limit(too_many).build().is_err());
/// # Ok::<(), anabranch::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    num_experts: usize,
    topk: usize,
    score: Score,
    renormalize: Renormalize,
    scale: f32,
    group_limit: Option<GroupLimit>,
    capacity: Option<Capacity>,
    adaptive: Adaptive,
}

impl Routing {
    /// Starts a routing of `topk` out of `num_experts` experts: softmax, not renormalised, scale 1, no groups,
    /// dropless, fixed k.
    pub fn builder(num_experts: usize, topk: usize) -> RoutingBuilder {
        RoutingBuilder(Self {
            num_experts,
            topk,
            score: Score::Softmax,
            renormalize: Renormalize::None,
            scale: 1.0,
            group_limit: None,
            capacity: None,
            adaptive: Adaptive::Fixed,
        })
    }

    /// Number of routed experts, E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Slots per token, K.
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// How logits become scores.
    pub fn score(&self) -> Score {
        self.score
    }

    /// What happens to the chosen scores before scaling.
    pub fn renormalize(&self) -> Renormalize {
        self.renormalize
    }

    /// The routed scaling factor, applied last.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The group limit, if any. One group is no limit.
    pub fn group_limit(&self) -> Option<GroupLimit> {
        self.group_limit
    }

    /// The capacity, if tokens may be dropped.
    pub fn capacity(&self) -> Option<Capacity> {
        self.capacity
    }

    /// How many slots a token uses.
    pub fn adaptive(&self) -> Adaptive {
        self.adaptive
    }

    /// Tokens that one expert accepts out of `num_tokens`; `None` if nothing is dropped.
    pub fn expert_capacity(&self, num_tokens: usize) -> Option<usize> {
        self.capacity.map(|capacity| match capacity {
            Capacity::Factor(factor) => {
                let per_expert = (num_tokens * self.topk) as f64 / self.num_experts as f64;
                (per_expert * factor).ceil() as usize
            }
            Capacity::Tokens(tokens) => tokens,
        })
    }
}

/// Builds a [`Routing`].
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct RoutingBuilder(Routing);

impl RoutingBuilder {
    /// Sets how logits become scores.
    pub fn score(mut self, score: Score) -> Self {
        self.0.score = score;
        self
    }

    /// Sets whether the chosen scores are made to sum to one.
    pub fn renormalize(mut self, renormalize: Renormalize) -> Self {
        self.0.renormalize = renormalize;
        self
    }

    /// Sets the routed scaling factor, applied after renormalisation.
    pub fn scale(mut self, scale: f32) -> Self {
        self.0.scale = scale;
        self
    }

    /// Limits every token to its best groups of experts.
    pub fn group_limit(mut self, limit: GroupLimit) -> Self {
        self.0.group_limit = Some(limit);
        self
    }

    /// Limits every expert to a number of tokens; the rest are dropped.
    pub fn capacity(mut self, capacity: Capacity) -> Self {
        self.0.capacity = Some(capacity);
        self
    }

    /// Lets every token use its own number of slots.
    pub fn adaptive(mut self, adaptive: Adaptive) -> Self {
        self.0.adaptive = adaptive;
        self
    }

    /// Validates the settings.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are no experts or more than [`MAX_EXPERTS`], `topk` is 0, more than [`MAX_TOPK`]
    /// or more than there are experts to choose from, the groups do not divide the experts, a group of one is
    /// scored by its two best, or a factor is not finite and positive.
    pub fn build(self) -> Result<Routing> {
        let routing = self.0;
        let (experts, topk) = (routing.num_experts, routing.topk);
        check("num_experts", (1..=MAX_EXPERTS).contains(&experts), &format!("1 to {MAX_EXPERTS}"), &experts)?;
        let most = MAX_TOPK.min(experts);
        check("topk", (1..=most).contains(&topk), &format!("1 to {most} with {experts} experts"), &topk)?;
        check("scale", routing.scale.is_finite() && routing.scale > 0.0, "finite and positive", &routing.scale)?;
        if let Some(GroupLimit { n_group, topk_group, score }) = routing.group_limit {
            let divides = n_group > 0 && experts.is_multiple_of(n_group);
            check("n_group", divides, &format!("a divisor of {experts} experts"), &n_group)?;
            check("topk_group", (1..=n_group).contains(&topk_group), &format!("1 to {n_group}"), &topk_group)?;
            let size = experts / n_group;
            let reach = topk_group * size;
            check("topk", topk <= reach, &format!("at most {reach}, the experts of {topk_group} groups"), &topk)?;
            let enough = score != GroupScore::Top2Sum || size >= 2;
            check("n_group", enough, "small enough for two experts in each group", &n_group)?;
        }
        match routing.capacity {
            Some(Capacity::Factor(factor)) => {
                check("capacity factor", factor.is_finite() && factor > 0.0, "finite and positive", &factor)?;
            }
            Some(Capacity::Tokens(tokens)) => check("capacity", tokens > 0, "at least one token", &tokens)?,
            None => {}
        }
        Ok(routing)
    }
}

fn check(setting: &'static str, holds: bool, expected: &str, got: &dyn std::fmt::Display) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Setting { operation: "routing", setting, expected: expected.to_owned(), got: got.to_string() })
}
