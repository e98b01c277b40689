//! A routing of the header as the validated value, for its refusals in words.

use anabranch::{
    Adaptive, Capacity, GroupLimit, GroupScore, Renormalize, Routing, Score,
    cuda::sys::{AnabranchAdaptive, AnabranchGroupScore, AnabranchRenormalize, AnabranchRouting, AnabranchScore},
};

use crate::report::Refusal;

/// Validates every field.
pub(crate) fn routing(of: &AnabranchRouting) -> Result<Routing, Refusal> {
    let unknown = |field: &str, value: u32| {
        Refusal::setting(format_args!("routing: {field} must be a value of its enum, got {value}"))
    };
    let mut builder = Routing::builder(of.num_experts as usize, of.topk as usize)
        .score(match of.score {
            AnabranchScore::ANABRANCH_SCORE_SOFTMAX => Score::Softmax,
            AnabranchScore::ANABRANCH_SCORE_SIGMOID => Score::Sigmoid,
            AnabranchScore::ANABRANCH_SCORE_TOPK_SOFTMAX => Score::TopkSoftmax,
            AnabranchScore(other) => return Err(unknown("score", other)),
        })
        .renormalize(match of.renormalize {
            AnabranchRenormalize::ANABRANCH_RENORMALIZE_NONE => Renormalize::None,
            AnabranchRenormalize::ANABRANCH_RENORMALIZE_SUM => Renormalize::Sum,
            AnabranchRenormalize(other) => return Err(unknown("renormalize", other)),
        })
        .adaptive(match of.adaptive {
            AnabranchAdaptive::ANABRANCH_ADAPTIVE_FIXED => Adaptive::Fixed,
            AnabranchAdaptive::ANABRANCH_ADAPTIVE_COMPLEXITY => Adaptive::Complexity,
            AnabranchAdaptive::ANABRANCH_ADAPTIVE_ENTROPY => Adaptive::Entropy,
            AnabranchAdaptive(other) => return Err(unknown("adaptive", other)),
        })
        .scale(of.scale);
    let score = match of.group_score {
        AnabranchGroupScore::ANABRANCH_GROUP_SCORE_MAX => GroupScore::Max,
        AnabranchGroupScore::ANABRANCH_GROUP_SCORE_TOP2_SUM => GroupScore::Top2Sum,
        AnabranchGroupScore(other) => return Err(unknown("group_score", other)),
    };
    if of.n_group > 0 {
        builder =
            builder.group_limit(GroupLimit { n_group: of.n_group as usize, topk_group: of.topk_group as usize, score });
    }
    if of.expert_capacity > 0 {
        builder = builder.capacity(Capacity::Tokens(of.expert_capacity as usize));
    }
    Ok(builder.build()?)
}
