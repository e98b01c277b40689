//! Attention on the CPU: projections, rotation, cache write, attention, output projection.

use anabranch::reference::{
    AttentionShape, LatentShape, attention, latent_attention, linear, rms_norm, rms_norm_heads, rotate,
};

use super::{
    CpuTensor,
    cache::{Layer, Pass},
    layer, project,
};
use crate::{
    Config, Error, Result,
    config::Attention,
    weights::{AttentionWeights, StoredLinear},
};

/// An attention's weights, with the shape that they have.
#[derive(Debug)]
pub struct CpuAttention {
    kind: Kind,
    output: StoredLinear,
}

#[derive(Debug)]
enum Kind {
    Grouped(Grouped),
    Latent(Latent),
}

#[derive(Debug)]
struct Grouped {
    shape: AttentionShape,
    q: StoredLinear,
    k: StoredLinear,
    v: StoredLinear,
    qk_norm: Option<[Vec<f32>; 2]>,
    norm_eps: f32,
    clip: Option<f32>,
}

#[derive(Debug)]
struct Latent {
    shape: LatentShape,
    q_a: Option<(StoredLinear, Vec<f32>)>,
    q: StoredLinear,
    kv_a: StoredLinear,
    kv_a_norm: Vec<f32>,
    norm_eps: f32,
    /// Multiplied from both sides, so kept in float32.
    kv_b: Vec<f32>,
}

impl CpuAttention {
    pub(super) fn new(config: &Config, weights: AttentionWeights) -> Result<Self> {
        let scale = config.softmax_scale;
        match (&config.attention, weights) {
            (
                &Attention::Grouped { num_heads, num_kv_heads, head_dim, clip_qkv, .. },
                AttentionWeights::Grouped { q, k, v, o, qk_norm },
            ) => {
                let shape = AttentionShape { num_heads, num_kv_heads, key_dim: head_dim, value_dim: head_dim, scale };
                let grouped = Grouped { shape, q, k, v, qk_norm, norm_eps: config.rms_norm_eps, clip: clip_qkv };
                Ok(Self { kind: Kind::Grouped(grouped), output: o })
            }
            (
                &Attention::Latent {
                    num_heads,
                    kv_lora_rank,
                    qk_nope_head_dim,
                    qk_rope_head_dim,
                    v_head_dim,
                    inner_norm_eps: norm_eps,
                    ..
                },
                AttentionWeights::Latent { q_a, q, kv_a, kv_a_norm, kv_b, o },
            ) => {
                let shape =
                    LatentShape { num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, scale };
                let kv_b = kv_b.matrix()?.to_vec();
                let latent = Latent { shape, q_a, q, kv_a, kv_a_norm, norm_eps, kv_b };
                Ok(Self { kind: Kind::Latent(latent), output: o })
            }
            _ => Err(Error::Input("an attention's weights are of another kind than its configuration".into())),
        }
    }

    pub(super) fn forward(&self, x: &CpuTensor, pass: &Pass, cache: &mut Layer) -> Result<CpuTensor> {
        let heads = match &self.kind {
            Kind::Grouped(grouped) => grouped.forward(x, pass, cache)?,
            Kind::Latent(latent) => latent.forward(x, pass, cache)?,
        };
        Ok(CpuTensor { values: linear(&heads, x.rows(), &layer(&self.output)?)?, width: x.width })
    }
}

impl Grouped {
    fn forward(&self, x: &CpuTensor, pass: &Pass, cache: &mut Layer) -> Result<Vec<f32>> {
        let AttentionShape { num_heads, num_kv_heads, key_dim, .. } = self.shape;
        let (mut q, mut k, mut v) = (project(x, &self.q)?, project(x, &self.k)?, project(x, &self.v)?);
        if let Some([q_norm, k_norm]) = &self.qk_norm {
            // A norm's weight is as long as what it normalises: a head, or the whole projection.
            q = rms_norm(&q, q_norm, self.norm_eps)?;
            k = rms_norm(&k, k_norm, self.norm_eps)?;
        }
        if let Some(limit) = self.clip {
            [&mut q, &mut k, &mut v].into_iter().flatten().for_each(|value| *value = value.clamp(-limit, limit));
        }
        rotate(&mut q, num_heads, key_dim, 0, &pass.rope)?;
        rotate(&mut k, num_kv_heads, key_dim, 0, &pass.rope)?;
        let (width, kv_width) = (num_heads * key_dim, num_kv_heads * key_dim);
        let mut out = Vec::with_capacity(q.len());
        cache.keys.write(&pass.rows, &k, kv_width);
        cache.values.write(&pass.rows, &v, kv_width);
        for (sequence, tokens) in pass.sequences() {
            let (keys, values) = (cache.keys.of(sequence, kv_width)?, cache.values.of(sequence, kv_width)?);
            let q = &q[tokens.start * width..tokens.end * width];
            out.extend(attention(&self.shape, q, [&keys, &values], [kv_width, kv_width])?);
        }
        Ok(out)
    }
}

impl Latent {
    fn forward(&self, x: &CpuTensor, pass: &Pass, cache: &mut Layer) -> Result<Vec<f32>> {
        let LatentShape { num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } = self.shape;
        let mut q = match &self.q_a {
            Some((down, norm)) => {
                let down = rms_norm(&project(x, down)?, norm, self.norm_eps)?;
                linear(&down, x.rows(), &layer(&self.q)?)?
            }
            None => project(x, &self.q)?,
        };
        let head_dim = qk_nope_head_dim + qk_rope_head_dim;
        rotate(&mut q, num_heads, head_dim, qk_nope_head_dim, &pass.rope)?;

        let mut latents = project(x, &self.kv_a)?;
        let width = kv_lora_rank + qk_rope_head_dim;
        rms_norm_heads(&mut latents, width, &self.kv_a_norm, self.norm_eps)?;
        rotate(&mut latents, 1, width, kv_lora_rank, &pass.rope)?;

        let q_width = num_heads * head_dim;
        let mut out = Vec::with_capacity(x.rows() * num_heads * v_head_dim);
        cache.keys.write(&pass.rows, &latents, width);
        for (sequence, tokens) in pass.sequences() {
            let q = &q[tokens.start * q_width..tokens.end * q_width];
            out.extend(latent_attention(&self.shape, q, &cache.keys.of(sequence, width)?, &self.kv_b)?);
        }
        Ok(out)
    }
}
