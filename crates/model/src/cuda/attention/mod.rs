//! Attention on the GPU: projections, rotation and cache write, attention, output projection.

mod expansion;
mod grouped;
mod latent;
mod latent_weights;

use anabranch::{
    cuda::{AttentionInput, DecodeProjections, RopeTable, View, ViewMut, attention_into, attention_workspace},
    reference::AttentionShape,
};
use half::bf16;

pub(super) use self::{expansion::Expanded, latent_weights::LatentSizes};
use self::{grouped::Grouped, latent::Latent};
use super::{
    cache::{CudaCache, DeviceBatch, LayerCache},
    layers::{Dense, Norm},
    load::{Axis, pad},
    memory::{Buffer, Gpu},
};
use crate::{Config, Error, Result, config::Attention, weights::AttentionWeights};

/// An attention's weights on the GPU.
#[derive(Debug)]
pub struct CudaAttention {
    kind: Kind,
    output: Dense,
}

#[derive(Debug)]
enum Kind {
    Grouped(Box<Grouped>),
    Latent(Box<Latent>),
}

/// Refuses heads that no kernel takes.
pub(super) fn check(config: &Config) -> Result<()> {
    let refuse = |what: String| Err(Error::Input(format!("{what}: run the model with --device cpu")));
    match (&config.attention, LatentSizes::of(&config.attention)) {
        (_, Some(sizes)) if sizes.key() > 576 || sizes.latent > 512 => refuse(format!(
            "latents of {} and rotated keys of {} elements have no kernel on a GPU, which takes 512 and 576 together",
            sizes.latent, sizes.rope
        )),
        (&Attention::Grouped { head_dim, .. }, _) if head_dim > 128 => {
            refuse(format!("heads of {head_dim} elements have no kernel on a GPU, which takes 128"))
        }
        _ => Ok(()),
    }
}

/// Elements a token that a step needs in each of the three scratch buffers.
pub(super) fn widths(config: &Config) -> Result<[usize; 3]> {
    match (&config.attention, LatentSizes::of(&config.attention)) {
        (Attention::Latent { q_lora_rank, .. }, Some(sizes)) => {
            let head = sizes.head.max(sizes.key()).max(sizes.value);
            let a = sizes.key().max(pad(q_lora_rank.unwrap_or(0)));
            Ok([a, sizes.num_heads * head, sizes.num_heads * head])
        }
        (&Attention::Grouped { num_heads, num_kv_heads, head_dim, .. }, _) => {
            let width = num_heads * pad(head_dim);
            let kv_width = 2 * num_kv_heads * pad(head_dim);
            // A single token's keys and values follow its queries.
            Ok([width + kv_width, kv_width, width])
        }
        _ => Err(Error::Input("this kind of attention has no kernels".to_owned())),
    }
}

/// Elements of a token's row of keys and of values in a layer's cache.
pub(super) fn cache_widths(config: &Config) -> [usize; 2] {
    match config.attention {
        Attention::Grouped { num_kv_heads, head_dim, .. } => [num_kv_heads * pad(head_dim); 2],
        Attention::Latent { kv_lora_rank, qk_rope_head_dim, .. } => [pad(kv_lora_rank) + pad(qk_rope_head_dim), 0],
    }
}

impl CudaAttention {
    pub(super) fn load(gpu: &Gpu, config: &Config, weights: &AttentionWeights) -> Result<Self> {
        let d = Axis::whole(config.hidden_size);
        let (kind, o, heads) = match weights {
            AttentionWeights::Grouped { o, .. } => {
                let (grouped, heads) = Grouped::load(gpu, config, weights, d)?;
                (Kind::Grouped(Box::new(grouped)), o, heads)
            }
            AttentionWeights::Latent { o, .. } => {
                let (latent, heads) = Latent::load(gpu, config, weights, d)?;
                (Kind::Latent(Box::new(latent)), o, heads)
            }
        };
        Ok(Self { kind, output: Dense::load(gpu, o, d, heads)? })
    }

    /// Columns of the residual stream.
    pub(super) fn width(&self) -> usize {
        self.output.out()
    }

    /// What a step of all layers wants to know: what makes heads, the output projection, and the widths of the cache's rows.
    pub(super) fn of_step(&self) -> (DecodeProjections<'_>, View<'_, bf16>, [usize; 2]) {
        let (projections, widths) = match &self.kind {
            Kind::Grouped(grouped) => {
                let AttentionShape { num_kv_heads, key_dim, value_dim, .. } = grouped.shape;
                let norms = grouped.head_norms.as_ref().map(|[q, k]| [q.weight(), k.weight()]);
                let widths = [num_kv_heads * key_dim, num_kv_heads * value_dim];
                (DecodeProjections::Grouped { qkv: grouped.qkv.weight(), norms }, widths)
            }
            Kind::Latent(latent) => {
                let projections = DecodeProjections::Latent {
                    q: latent.q.weight(),
                    kv: latent.kv_a.weight(),
                    kv_norm: latent.kv_a_norm.weight(),
                    absorb: latent.absorb.view(),
                    expand: latent.expand.view(),
                };
                (projections, [latent.shape.key_dim, 0])
            }
        };
        (projections, self.output.weight(), widths)
    }

    /// From the residual stream to `delta`.
    pub(super) fn run(&self, gpu: &Gpu, norm: &Norm, layer: usize, cache: &mut CudaCache) -> Result<()> {
        let CudaCache { layers, rope, batch, work, .. } = cache;
        let step = Step { gpu, norm, batch, rope, layer: &mut layers[layer] };
        match &self.kind {
            Kind::Grouped(grouped) => grouped.run(step, work)?,
            Kind::Latent(latent) => latent.run(step, work)?,
        }
        let tokens = batch.tokens;
        let out = &mut work.residual.delta.part_mut(0, [tokens, self.output.out()])?;
        self.output.run(&gpu.stream, work.c.part(0, [tokens, self.output.inner()])?, out)
    }
}

/// What a layer's attention runs on.
struct Step<'a> {
    gpu: &'a Gpu,
    /// Of the residual stream.
    norm: &'a Norm,
    batch: &'a DeviceBatch,
    rope: &'a RopeTable,
    layer: &'a mut LayerCache,
}

fn mismatch() -> Error {
    Error::Input("an attention's weights are of another kind than its configuration".to_owned())
}

/// Attention with as much workspace as it asks for.
fn attend(
    gpu: &Gpu,
    shape: &AttentionShape,
    input: &AttentionInput<'_>,
    bytes: &mut Buffer<u8>,
    out: &mut ViewMut<'_, bf16>,
) -> Result<()> {
    gpu.reserve(bytes, attention_workspace(&gpu.stream, shape, input)?)?;
    Ok(attention_into(&gpu.stream, shape, input, &mut bytes.view_mut(), out)?)
}
