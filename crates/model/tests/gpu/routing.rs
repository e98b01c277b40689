//! Where the GPU's routers choose otherwise than float32 does: only where the choice hangs on rounding.

use std::collections::BTreeSet;

use anabranch::{Routing, reference::router};
use anabranch_model::{Checkpoint, Config, Cpu, GivenRouting, Observer, TopkIds};

use crate::support::{Expected, folder, golden, halves, load, logits, on_gpu};

/// How far rounding moves a router's logit, of the largest of the token: four units in the last place of bf16.
const ROUNDING: f32 = 1.0 / 64.0;

/// Experts and logits of the routers.
#[derive(Default)]
struct Routers {
    ids: Vec<(usize, Vec<i32>)>,
    logits: Vec<(usize, Vec<f32>)>,
}

impl Observer for Routers {
    fn hidden(&mut self, _: usize, _: Vec<f32>) {}

    fn topk(&mut self, layer: usize, ids: TopkIds) {
        self.ids.push((layer, ids.ids));
    }

    fn router_logits(&mut self, layer: usize, logits: Vec<f32>) {
        self.logits.push((layer, logits));
    }
}

/// Layer by layer, with the golden experts everywhere else, so that each router sees what it should but for rounding.
#[test]
#[ignore = "needs a CUDA GPU"]
fn flips_hang_on_rounding() {
    on_gpu(|gpu| {
        let (mut flips, mut all) = (0, 0);
        for name in &golden() {
            let (model, reference, expected) = (load(name, gpu()), load(name, Cpu), Expected::open(name));
            let config = model.config();
            let Some(moe) = &config.moe else { continue };
            let routing = &moe.routing;
            let (topk, experts) = (routing.topk(), routing.num_experts());
            let ids = expected.tokens("input_ids");
            let right = expected.routing(config);
            let mut float = Routers::default();
            logits(&reference, &ids, &halves(&ids), Some(&mut float), &right);
            for (layer, float) in &float.logits {
                let others: GivenRouting =
                    right.iter().filter(|(other, _)| *other != layer).map(|(l, ids)| (*l, ids.clone())).collect();
                let mut seen = Routers::default();
                logits(&model, &ids, &halves(&ids), Some(&mut seen), &others);
                let (_, taken) = seen.ids.iter().find(|(other, _)| other == layer).unwrap();
                let bias = selection_bias(name, config, *layer);
                let tokens = float.chunks_exact(experts).zip(taken.chunks_exact(topk));
                for (token, (logits, taken)) in tokens.enumerate() {
                    let expected: BTreeSet<i32> =
                        right[layer].ids[token * topk..(token + 1) * topk].iter().copied().collect();
                    let wrong: Vec<i32> = taken.iter().copied().filter(|id| !expected.contains(id)).collect();
                    all += 1;
                    flips += usize::from(!wrong.is_empty());
                    for expert in wrong {
                        assert!(
                            could_be_taken(routing, logits, bias.as_deref(), expert),
                            "{name}: layer {layer} took expert {expert} for token {token}, by logits {logits:?} \
                             instead of {expected:?}"
                        );
                    }
                }
            }
        }
        println!("{flips} of {all} choices differ from float32, each within rounding");
        assert!(flips * 20 <= all, "{flips} of {all} choices differ");
    });
}

/// What the layer's router adds to the scores that it selects by.
pub(crate) fn selection_bias(name: &str, config: &Config, layer: usize) -> Option<Vec<f32>> {
    config.moe.as_ref().filter(|moe| moe.selection_bias)?;
    let tensor = format!("model.layers.{layer}.mlp.gate.e_score_correction_bias");
    Some(Checkpoint::open(&folder(name)).unwrap().get(&tensor).unwrap().to_f32().unwrap())
}

/// Whether the reference takes these and no others once every logit has moved by no more than rounding: theirs up, all others down.
/// Where a group comes in for another, experts come with it that were far behind.
pub(crate) fn could_be_chosen(routing: &Routing, logits: &[f32], bias: Option<&[f32]>, taken: &BTreeSet<i32>) -> bool {
    let step = ROUNDING * logits.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
    let moved: Vec<f32> = (0..)
        .zip(logits)
        .map(|(expert, logit)| if taken.contains(&expert) { logit + step } else { logit - step })
        .collect();
    router(routing, &moved, bias, None).unwrap().topk_ids.into_iter().collect::<BTreeSet<_>>() == *taken
}

/// Whether the reference takes the expert once every logit has moved by no more than rounding: its own up, or its group's,
/// all others down.
pub(crate) fn could_be_taken(routing: &Routing, logits: &[f32], bias: Option<&[f32]>, expert: i32) -> bool {
    let step = ROUNDING * logits.iter().fold(0.0_f32, |most, logit| most.max(logit.abs()));
    let group = routing.num_experts() / routing.group_limit().map_or(1, |limit| limit.n_group);
    let own = |other: usize| other == expert as usize;
    let near = |other: usize| routing.group_limit().is_some() && other / group == expert as usize / group;
    let mates = |other: usize| own(other) || near(other);
    let raised: [&dyn Fn(usize) -> bool; 2] = [&own, &mates];
    raised.into_iter().any(|raised| {
        let moved: Vec<f32> = logits
            .iter()
            .enumerate()
            .map(|(other, logit)| if raised(other) { logit + step } else { logit - step })
            .collect();
        router(routing, &moved, bias, None).unwrap().topk_ids.contains(&expert)
    })
}
