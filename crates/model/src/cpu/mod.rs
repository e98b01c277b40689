//! The CPU backend: the reference operations on memory-mapped weights.

mod attention;
mod cache;

pub use attention::CpuAttention;
pub use cache::CpuCache;

use anabranch::{
    Routing,
    reference::{Expert, Linear, Matrix, MoeLayer, SharedExpert, embedding, expert_forward, linear, rms_norm},
};

use crate::{
    Backend, Config, Error, Result,
    backend::{Positions, TopkIds},
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
}

fn matrix(stored: &StoredLinear) -> Result<Matrix<'_>> {
    let [rows, columns] = *stored.weight.shape() else {
        return Err(Error::Checkpoint {
            path: stored.weight.path().to_owned(),
            problem: format!(
                "tensor {} must have 2 dimensions, got shape {:?}",
                stored.weight.name(),
                stored.weight.shape()
            ),
        });
    };
    let matrix = Matrix::new(stored.weight.weight_dtype()?, rows, columns, stored.weight.bytes())?;
    Ok(match &stored.scales {
        Some((scales, block)) => matrix.with_scales(scales.bytes(), *block)?,
        None => matrix,
    })
}

fn layer(stored: &StoredLinear) -> Result<Linear<'_>> {
    Ok(Linear { weight: matrix(stored)?, bias: stored.bias.as_deref() })
}

fn expert(stored: &SwiGluWeights) -> Result<Expert<'_>> {
    Ok(Expert::SwiGlu { gate: layer(&stored.gate)?, up: layer(&stored.up)?, down: layer(&stored.down)? })
}

fn project(x: &CpuTensor, stored: &StoredLinear) -> Result<Vec<f32>> {
    Ok(linear(&x.values, x.rows(), &layer(stored)?)?)
}

impl Backend for Cpu {
    type Tensor = CpuTensor;
    type Table = StoredLinear;
    type Norm = Vec<f32>;
    type Attention = CpuAttention;
    type FeedForward = FeedForwardWeights;
    type Cache = CpuCache;

    fn load_table(&self, weights: &StoredLinear) -> Result<StoredLinear> {
        matrix(weights)?;
        Ok(weights.clone())
    }

    fn load_norm(&self, weight: Vec<f32>) -> Result<Vec<f32>> {
        Ok(weight)
    }

    fn load_attention(&self, config: &Config, weights: AttentionWeights) -> Result<CpuAttention> {
        CpuAttention::new(config, weights)
    }

    fn load_feed_forward(&self, _: &Config, weights: FeedForwardWeights) -> Result<FeedForwardWeights> {
        Ok(weights)
    }

    fn cache(&self, config: &Config, capacities: &[usize]) -> Result<CpuCache> {
        Ok(CpuCache::new(config.layers.len(), capacities))
    }

    fn embed(&self, table: &StoredLinear, ids: &[u32]) -> Result<CpuTensor> {
        let table = matrix(table)?;
        Ok(CpuTensor { values: embedding(&table, ids)?, width: table.columns() })
    }

    fn norm(&self, config: &Config, x: &CpuTensor, norm: &Vec<f32>) -> Result<CpuTensor> {
        Ok(CpuTensor { values: rms_norm(&x.values, norm, config.rms_norm_eps)?, width: x.width })
    }

    fn add(&self, x: &mut CpuTensor, y: &CpuTensor) -> Result<()> {
        x.values.iter_mut().zip(&y.values).for_each(|(x, y)| *x += y);
        Ok(())
    }

    fn attention(
        &self,
        _: &Config,
        weights: &CpuAttention,
        x: &CpuTensor,
        layer: usize,
        positions: &Positions<'_>,
        cache: &mut CpuCache,
    ) -> Result<CpuTensor> {
        weights.forward(x, layer, positions.segments, &positions.rope, cache)
    }

    fn feed_forward(
        &self,
        config: &Config,
        weights: &FeedForwardWeights,
        x: &CpuTensor,
        _: bool,
    ) -> Result<(CpuTensor, Option<TopkIds>)> {
        match weights {
            FeedForwardWeights::Dense(weights) => {
                let values = expert_forward(&x.values, x.rows(), &expert(weights)?)?;
                Ok((CpuTensor { values, width: x.width }, None))
            }
            FeedForwardWeights::Moe { gate, selection_bias, experts, shared } => {
                let routing = config.moe.as_ref().map(|moe| moe.routing).ok_or_else(|| {
                    Error::Input("a layer has routed experts, but the configuration describes none".into())
                })?;
                moe(routing, gate, selection_bias.as_deref(), experts, shared.as_ref(), x)
            }
        }
    }

    fn logits(&self, head: &StoredLinear, x: &CpuTensor, rows: &[usize]) -> Result<Vec<f32>> {
        let mut chosen = Vec::with_capacity(rows.len() * x.width);
        for row in rows {
            if *row >= x.rows() {
                return Err(Error::Input(format!("row {row} of {} rows of hidden states does not exist", x.rows())));
            }
            chosen.extend_from_slice(&x.values[row * x.width..(row + 1) * x.width]);
        }
        Ok(linear(&chosen, rows.len(), &layer(head)?)?)
    }

    fn read(&self, x: &CpuTensor) -> Result<Vec<f32>> {
        Ok(x.values.clone())
    }
}

fn moe(
    routing: Routing,
    gate: &StoredLinear,
    selection_bias: Option<&[f32]>,
    experts: &[SwiGluWeights],
    shared: Option<&(SwiGluWeights, Option<StoredLinear>)>,
    x: &CpuTensor,
) -> Result<(CpuTensor, Option<TopkIds>)> {
    let shared = match shared {
        Some((weights, gate)) => {
            Some(SharedExpert { expert: expert(weights)?, gate: gate.as_ref().map(layer).transpose()? })
        }
        None => None,
    };
    let gate = layer(gate)?;
    let experts = experts.iter().map(expert).collect::<Result<_>>()?;
    let out = MoeLayer { routing, gate, selection_bias, experts, shared }.forward(&x.values, None)?;
    let ids = TopkIds { ids: out.routing.topk_ids, topk: routing.topk() };
    Ok((CpuTensor { values: out.y, width: x.width }, Some(ids)))
}
