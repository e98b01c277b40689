//! Multi-head and grouped-query attention.

use anabranch::{
    cuda::{AttentionInput, Epilogue, HeadRange, RopeBuffers, RopeCache, rope_into},
    reference::AttentionShape,
};

use super::{
    super::{
        layers::{Dense, Norm},
        load::{Axis, pad},
        memory::Gpu,
        workspace::Workspace,
    },
    Step, attend, mismatch,
};
use crate::{
    Config, Result,
    config::{Attention, QkNorm},
    weights::AttentionWeights,
};

#[derive(Debug)]
pub(super) struct Grouped {
    pub(super) shape: AttentionShape,
    /// Queries, keys, values.
    pub(super) qkv: Dense,
    /// Of each head of queries and of keys, where they are rotated.
    pub(super) head_norms: Option<[Norm; 2]>,
    /// Of all of them at once, before that.
    whole_norms: Option<[Norm; 2]>,
    clip: Option<f32>,
}

impl Grouped {
    /// The weights, and how the output projection's columns lie.
    pub(super) fn load(gpu: &Gpu, config: &Config, weights: &AttentionWeights, d: Axis) -> Result<(Self, Axis)> {
        let (
            &Attention::Grouped { num_heads, num_kv_heads, head_dim, qk_norm, clip_qkv, .. },
            AttentionWeights::Grouped { q, k, v, qk_norm: norm_weights, .. },
        ) = (&config.attention, weights)
        else {
            return Err(mismatch());
        };
        let (heads, kv_heads) = (Axis::heads(num_heads, head_dim), Axis::heads(num_kv_heads, head_dim));
        let load = |[q_axis, k_axis]: [Axis; 2]| {
            let Some([q, k]) = norm_weights else { return Err(mismatch()) };
            let load = |weight: &[f32], axis| Norm::load(gpu, weight, axis, config.rms_norm_eps);
            Ok(Some([load(q, q_axis)?, load(k, k_axis)?]))
        };
        let (head_norms, whole_norms) = match qk_norm {
            QkNorm::None => (None, None),
            QkNorm::PerHead => (load([Axis::whole(head_dim); 2])?, None),
            QkNorm::Whole => (None, load([heads, kv_heads])?),
        };
        let head = pad(head_dim);
        let shape =
            AttentionShape { num_heads, num_kv_heads, key_dim: head, value_dim: head, scale: config.softmax_scale };
        let qkv = Dense::stack(gpu, &[(q, heads), (k, kv_heads), (v, kv_heads)], d, Epilogue::Linear)?;
        Ok((Self { shape, qkv, head_norms, whole_norms, clip: clip_qkv }, heads))
    }

    /// From the residual stream to the heads' output in `c`.
    pub(super) fn run(&self, step: Step<'_>, work: &mut Workspace) -> Result<()> {
        let Step { gpu, norm, batch, rope, layer } = step;
        let (stream, tokens) = (&gpu.stream, batch.tokens);
        let AttentionShape { num_heads, num_kv_heads, key_dim: head_dim, .. } = self.shape;
        let (width, kv_width) = (num_heads * head_dim, 2 * num_kv_heads * head_dim);
        let heads = HeadRange { column: 0, num_heads, head_dim };
        let keys = HeadRange { column: 0, num_heads: num_kv_heads, head_dim };
        let values = HeadRange { column: keys.width(), ..keys };

        let (mut q, mut kv) = if tokens == 1 {
            let Workspace { residual, normed, a, .. } = &mut *work;
            let qkv = &mut a.part_mut(0, [1, width + kv_width])?;
            residual.norm_product(stream, norm, &self.qkv, normed, tokens, qkv)?;
            a.parts_mut([1, width], [1, kv_width])?
        } else {
            work.norm(gpu, norm, tokens)?;
            let x = || work.normed.part(0, [tokens, self.qkv.inner()]);
            let (mut q, mut kv) = (work.a.part_mut(0, [tokens, width])?, work.b.part_mut(0, [tokens, kv_width])?);
            self.qkv.run_columns(stream, x()?, 0..width, &mut q)?;
            self.qkv.run_columns(stream, x()?, width..width + kv_width, &mut kv)?;
            (q, kv)
        };
        if let Some([q_norm, k_norm]) = &self.whole_norms {
            q_norm.run_heads(stream, &mut q, heads)?;
            k_norm.run_heads(stream, &mut kv, keys)?;
        }
        let (q_norm, k_norm) = match &self.head_norms {
            Some([q, k]) => (Some(q.of_heads()), Some(k.of_heads())),
            None => (None, None),
        };
        let rows = [batch.cache_rows, num_kv_heads, head_dim];
        let mut buffers = RopeBuffers {
            positions: batch.positions(&batch.all)?,
            queries: q,
            q: heads,
            q_first: 0,
            q_norm,
            cache: Some(RopeCache {
                keys: Some(kv.view()),
                k: keys,
                k_first: 0,
                k_norm,
                values: Some(kv.view()),
                v: values,
                rows: batch.rows(&batch.all)?,
                k_cache: layer.keys.part_mut(0, rows)?,
                v_cache: layer.values.part_mut(0, rows)?,
            }),
            clip: self.clip,
        };
        rope_into(stream, rope, &mut buffers)?;
        let input = AttentionInput {
            q: work.a.part(0, [tokens, width])?,
            keys: layer.keys.view(),
            values: Some(layer.values.view()),
            batch: batch.attention(&batch.all)?,
        };
        attend(gpu, &self.shape, &input, &mut work.bytes, &mut work.c.part_mut(0, [tokens, width])?)?;
        Ok(())
    }
}
