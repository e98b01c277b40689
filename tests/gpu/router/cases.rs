//! What the router's property is tried on.

use anabranch::{Adaptive, Capacity, GroupLimit, GroupScore, Renormalize, Routing, Score};
use proptest::prelude::*;

use crate::support::Noise;

/// One call of the router.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) routing: Routing,
    pub(crate) num_tokens: usize,
    pub(crate) flavour: Flavour,
    pub(crate) bias: bool,
    pub(crate) seed: u64,
    /// Elements by which the logits start off an aligned address.
    pub(crate) offset: usize,
}

/// What the logits look like.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Flavour {
    Normal,
    /// One expert, the first, about as likely as all others together: rounding of the sum shows.
    Peaked,
    /// So far apart that softmax saturates.
    Wide,
    /// A handful of values: nearly everything ties.
    Ties,
    /// One value.
    Equal,
    /// Normal ones with NaN, infinities and signed zeros among them.
    Ugly,
}

impl Case {
    pub(crate) fn logits(&self) -> Vec<f32> {
        let mut noise = Noise(self.seed);
        let experts = self.routing.num_experts();
        let peak = (experts as f32).ln();
        let lift = |at: usize| {
            if matches!(self.flavour, Flavour::Peaked) && at.is_multiple_of(experts) { peak } else { 0.0 }
        };
        (0..self.num_tokens * experts).map(|at| self.flavour.logit(&mut noise) + lift(at)).collect()
    }

    /// Of the size that balancing makes it, quantised so that sums tie too; infinite or NaN at times where things are ugly.
    pub(crate) fn bias(&self) -> Option<Vec<f32>> {
        let mut noise = Noise(self.seed ^ 0xb1a5);
        let ugly = matches!(self.flavour, Flavour::Ugly);
        let value = |noise: &mut Noise| match noise.bits() % 100 {
            0 if ugly => f32::NAN,
            1 if ugly => f32::NEG_INFINITY,
            2 if ugly => f32::INFINITY,
            _ => (noise.normal() * 16.0).round() / 64.0,
        };
        self.bias.then(|| (0..self.routing.num_experts()).map(|_| value(&mut noise)).collect())
    }

    pub(crate) fn complexity(&self) -> Option<Vec<f32>> {
        let mut noise = Noise(self.seed ^ 0xc0de);
        let value = |noise: &mut Noise| match noise.bits() % 50 {
            0 => f32::NAN,
            1 => 7.0,
            2 => -1.0,
            _ => noise.uniform(),
        };
        let given = self.routing.adaptive() == Adaptive::Complexity;
        given.then(|| (0..self.num_tokens).map(|_| value(&mut noise)).collect())
    }
}

impl Flavour {
    fn logit(self, noise: &mut Noise) -> f32 {
        match self {
            Self::Normal | Self::Peaked => noise.normal(),
            Self::Wide => noise.normal() * 20.0,
            Self::Ties => (noise.bits() % 5) as f32 - 2.0,
            Self::Equal => 0.25,
            Self::Ugly => match noise.bits() % 200 {
                0 => f32::NAN,
                1 => f32::INFINITY,
                2..=9 => f32::NEG_INFINITY,
                10..=20 => 0.0,
                21..=30 => -0.0,
                _ => noise.normal(),
            },
        }
    }
}

/// Any call: every rule, up to 599 tokens.
pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let experts = prop_oneof![
        1..=1024_usize,
        prop::sample::select(vec![1, 2, 8, 16, 32, 33, 60, 64, 96, 128, 160, 256, 257, 384, 512, 1024]),
    ];
    let flavour = prop::sample::select(vec![
        Flavour::Normal,
        Flavour::Normal,
        Flavour::Peaked,
        Flavour::Wide,
        Flavour::Ties,
        Flavour::Equal,
        Flavour::Ugly,
    ]);
    let tokens = prop_oneof![0..600_usize, 0..4_usize];
    (experts.prop_flat_map(any_routing), tokens, flavour, any::<bool>(), any::<u64>(), 0..4_usize).prop_map(
        |(routing, num_tokens, flavour, bias, seed, offset)| Case { routing, num_tokens, flavour, bias, seed, offset },
    )
}

fn any_routing(experts: usize) -> impl Strategy<Value = Routing> {
    let score = prop::sample::select(vec![Score::Softmax, Score::Sigmoid, Score::TopkSoftmax]);
    let renormalize = prop::sample::select(vec![Renormalize::None, Renormalize::Sum]);
    let adaptive = prop::sample::select(vec![
        Adaptive::Fixed,
        Adaptive::Fixed,
        Adaptive::Fixed,
        Adaptive::Complexity,
        Adaptive::Entropy,
    ]);
    let capacity = prop_oneof![
        3 => Just(None),
        1 => (0.1..2.0).prop_map(|factor| Some(Capacity::Factor(factor))),
        1 => (1..40_usize).prop_map(|tokens| Some(Capacity::Tokens(tokens))),
    ];
    let scale = prop::sample::select(vec![1.0_f32, 2.5, 16.0]);
    let topk = 1..=experts.min(32);
    (any_limit(experts), topk, score, renormalize, adaptive, capacity, scale).prop_map(
        move |(limit, topk, score, renormalize, adaptive, capacity, scale)| {
            let reach = limit.map_or(experts, |limit| experts / limit.n_group * limit.topk_group);
            let mut routing = Routing::builder(experts, topk.min(reach))
                .score(score)
                .renormalize(renormalize)
                .adaptive(adaptive)
                .scale(scale);
            if let Some(limit) = limit {
                routing = routing.group_limit(limit);
            }
            if let Some(capacity) = capacity {
                routing = routing.capacity(capacity);
            }
            routing.build().unwrap()
        },
    )
}

fn any_limit(experts: usize) -> impl Strategy<Value = Option<GroupLimit>> {
    let divisors: Vec<usize> = (1..=experts).filter(|groups| experts.is_multiple_of(*groups)).collect();
    let limit = prop::sample::select(divisors).prop_flat_map(move |n_group| {
        let scores =
            if experts / n_group < 2 { vec![GroupScore::Max] } else { vec![GroupScore::Max, GroupScore::Top2Sum] };
        (1..=n_group, prop::sample::select(scores)).prop_map(move |(topk_group, score)| GroupLimit {
            n_group,
            topk_group,
            score,
        })
    });
    prop_oneof![Just(None), limit.prop_map(Some)]
}
