//! The CPU backend: the reference operations on memory-mapped weights.

mod attention;
mod cache;

pub use attention::CpuAttention;
pub use cache::CpuCache;

use anabranch::{
    Routing,
    reference::{
        Expert, Linear, MoeLayer, SharedExpert, embedding, expert_forward, linear, rms_norm, router, topk_weights,
    },
};

use self::cache::Pass;
use crate::{
    Backend, Batch, Config, Error, Result,
    backend::{Routed, TopkIds, check_row},
    weights::{AttentionWeights, FeedForwardWeights, StoredLinear, SwiGluWeights},
};

/// Computes in float32 on all cores. Weights stay in the checkpoint's memory map, in their stored type; sizes are arbitrary.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

/// Activations `[rows, width]` in float32.
#[derive(Debug, Clone)]
pub struct CpuTensor {
    values: Vec<f32>,
    width: usize,
}

impl CpuTensor {
    fn rows(&self) -> usize {
        self.values.len() / self.width
    }

    fn add(&mut self, y: &Self) {
        self.values.iter_mut().zip(&y.values).for_each(|(x, y)| *x += y);
    }
}

fn layer(stored: &StoredLinear) -> Result<Linear<'_>> {
    Ok(Linear { weight: stored.matrix()?, bias: stored.bias.as_deref() })
}

fn expert(stored: &SwiGluWeights) -> Result<Expert<'_>> {
    Ok(Expert::SwiGlu { gate: layer(&stored.gate)?, up: layer(&stored.up)?, down: layer(&stored.down)? })
}

fn project(x: &CpuTensor, stored: &StoredLinear) -> Result<Vec<f32>> {
    Ok(linear(&x.values, x.rows(), &layer(stored)?)?)
}

impl Backend for Cpu {
    type Hidden = CpuTensor;
    type Table = StoredLinear;
    type Norm = Vec<f32>;
    type Attention = CpuAttention;
    type FeedForward = FeedForwardWeights;
    type Cache = CpuCache;

    fn prepare(&self, _: &Config) -> Result<()> {
        Ok(())
    }

    fn load_table(&self, weights: &StoredLinear) -> Result<StoredLinear> {
        weights.matrix()?;
        Ok(weights.clone())
    }

    fn load_norm(&self, _: &Config, weight: Vec<f32>) -> Result<Vec<f32>> {
        Ok(weight)
    }

    fn load_attention(&self, config: &Config, weights: AttentionWeights) -> Result<CpuAttention> {
        CpuAttention::new(config, weights)
    }

    fn load_feed_forward(&self, _: &Config, weights: FeedForwardWeights) -> Result<FeedForwardWeights> {
        Ok(weights)
    }

    fn cache(&self, config: &Config, blocks: usize) -> Result<CpuCache> {
        Ok(CpuCache::new(config, blocks))
    }

    fn embed(&self, config: &Config, table: &StoredLinear, batch: &Batch<'_>, cache: &mut CpuCache) -> Result<()> {
        let x = CpuTensor { values: embedding(&table.matrix()?, batch.ids)?, width: config.hidden_size };
        cache.written.note(batch.segments)?;
        cache.pass = Pass::new(config, batch.segments, x);
        Ok(())
    }

    fn attention(
        &self,
        config: &Config,
        norm: &Vec<f32>,
        weights: &CpuAttention,
        layer: usize,
        cache: &mut CpuCache,
    ) -> Result<()> {
        let CpuCache { layers, pass, .. } = cache;
        let delta = weights.forward(&normed(config, &pass.x, norm)?, pass, &mut layers[layer])?;
        pass.x.add(&delta);
        Ok(())
    }

    fn feed_forward(
        &self,
        config: &Config,
        norm: &Vec<f32>,
        weights: &FeedForwardWeights,
        routing: &mut Routed<'_>,
        cache: &mut CpuCache,
    ) -> Result<()> {
        let pass = &mut cache.pass;
        let x = normed(config, &pass.x, norm)?;
        let values = match weights {
            FeedForwardWeights::Dense(weights) => expert_forward(&x.values, x.rows(), &expert(weights)?)?,
            FeedForwardWeights::Moe { gate, selection_bias, experts, shared } => {
                let rule = config.moe.as_ref().map(|moe| moe.routing).ok_or_else(|| {
                    Error::Input("a layer has routed experts, but the configuration describes none".into())
                })?;
                moe(&moe_layer(rule, gate, selection_bias.as_deref(), experts, shared.as_ref())?, &x, routing)?
            }
        };
        pass.x.add(&CpuTensor { values, width: x.width });
        Ok(())
    }

    fn residual(&self, _: &Config, cache: &mut CpuCache) -> Result<Vec<f32>> {
        Ok(cache.pass.x.values.clone())
    }

    fn hidden(&self, config: &Config, norm: &Vec<f32>, cache: &mut CpuCache) -> Result<CpuTensor> {
        normed(config, &cache.pass.x, norm)
    }

    fn read(&self, _: &Config, hidden: &CpuTensor) -> Result<Vec<f32>> {
        Ok(hidden.values.clone())
    }

    fn logits(&self, _: &Config, head: &StoredLinear, hidden: &CpuTensor, rows: &[usize]) -> Result<Vec<f32>> {
        let (count, width) = (hidden.rows(), hidden.width);
        let mut chosen = Vec::with_capacity(rows.len() * width);
        for &row in rows {
            check_row(row, count)?;
            chosen.extend_from_slice(&hidden.values[row * width..(row + 1) * width]);
        }
        Ok(linear(&chosen, rows.len(), &layer(head)?)?)
    }
}

fn normed(config: &Config, x: &CpuTensor, norm: &[f32]) -> Result<CpuTensor> {
    Ok(CpuTensor { values: rms_norm(&x.values, norm, config.rms_norm_eps)?, width: x.width })
}

fn moe_layer<'a>(
    routing: Routing,
    gate: &'a StoredLinear,
    selection_bias: Option<&'a [f32]>,
    experts: &'a [SwiGluWeights],
    shared: Option<&'a (SwiGluWeights, Option<StoredLinear>)>,
) -> Result<MoeLayer<'a>> {
    let shared = match shared {
        Some((weights, gate)) => {
            Some(SharedExpert { expert: expert(weights)?, gate: gate.as_ref().map(layer).transpose()? })
        }
        None => None,
    };
    let experts = experts.iter().map(expert).collect::<Result<_>>()?;
    Ok(MoeLayer { routing, gate: layer(gate)?, selection_bias, experts, shared })
}

fn moe(layer: &MoeLayer<'_>, x: &CpuTensor, routed: &mut Routed<'_>) -> Result<Vec<f32>> {
    let rule = &layer.routing;
    let logits = linear(&x.values, x.rows(), &layer.gate)?;
    let mut routing = router(rule, &logits, layer.selection_bias, None)?;
    if let Some(given) = routed.given {
        routing.topk_weights = topk_weights(rule, &logits, &given.ids)?;
        routing.topk_ids.clone_from(&given.ids);
    }
    let y = layer.forward_routed(&x.values, &routing)?;
    if routed.wanted {
        routed.taken = Some((TopkIds { ids: routing.topk_ids, topk: rule.topk() }, logits));
    }
    Ok(y)
}
