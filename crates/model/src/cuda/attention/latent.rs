//! Latent attention is absorbed: `q_nope W_UK` makes a query of the latent's width, which attends to the cached rows
//! `[latent; rotated key]` themselves, and what comes out goes through `W_UV` (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Both are
//! products by head, a grouped GEMM whose experts are the heads. `W_UK` has ones where the rotated elements pass through.

use anabranch::{
    cuda::{
        AttentionInput, Epilogue, Gather, GroupedGemmInput, HeadRange, RopeBuffers, RopeCache, Stream, Tensor, Tile,
        View, grouped_gemm_into, permute_rows_into, rope_into,
    },
    reference::AttentionShape,
};
use half::bf16;

use super::{
    super::{
        cache::HeadOrder,
        layers::{Dense, Norm},
        load::{Axis, pad},
        memory::{Buffer, Gpu, Purpose},
        workspace::Workspace,
    },
    Step, attend, mismatch,
};
use crate::{
    Config, Result,
    config::Attention,
    weights::{AttentionWeights, StoredLinear},
};

#[derive(Debug)]
pub(super) struct Latent {
    pub(super) shape: AttentionShape,
    q_a: Option<(Dense, Norm)>,
    pub(super) q: Dense,
    pub(super) kv_a: Dense,
    pub(super) kv_a_norm: Norm,
    /// `[H, key_dim, head]`.
    pub(super) absorb: Buffer<bf16>,
    /// `[H, v, latent]`.
    pub(super) expand: Buffer<bf16>,
}

/// Sizes of latent attention as the device has them.
#[derive(Debug, Clone, Copy)]
pub(in crate::cuda) struct LatentSizes {
    pub(in crate::cuda) num_heads: usize,
    /// Of a projected query head.
    pub(in crate::cuda) head: usize,
    pub(in crate::cuda) latent: usize,
    pub(super) rope: usize,
    pub(in crate::cuda) value: usize,
}

impl LatentSizes {
    pub(in crate::cuda) fn of(attention: &Attention) -> Option<Self> {
        let &Attention::Latent { num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } =
            attention
        else {
            return None;
        };
        Some(Self {
            num_heads,
            head: pad(qk_nope_head_dim + qk_rope_head_dim),
            latent: pad(kv_lora_rank),
            rope: pad(qk_rope_head_dim),
            value: pad(v_head_dim),
        })
    }

    /// Of a cached row, and a query that attends to it.
    pub(in crate::cuda) fn key(&self) -> usize {
        self.latent + self.rope
    }
}

impl Latent {
    /// The weights, and how the output projection's columns lie.
    pub(super) fn load(gpu: &Gpu, config: &Config, weights: &AttentionWeights, d: Axis) -> Result<(Self, Axis)> {
        let (
            &Attention::Latent {
                num_heads,
                q_lora_rank,
                kv_lora_rank,
                qk_nope_head_dim,
                qk_rope_head_dim,
                v_head_dim,
                inner_norm_eps,
                ..
            },
            Some(sizes),
            AttentionWeights::Latent { q_a, q, kv_a, kv_a_norm, kv_b, .. },
        ) = (&config.attention, LatentSizes::of(&config.attention), weights)
        else {
            return Err(mismatch());
        };
        let shape = AttentionShape {
            num_heads,
            num_kv_heads: 1,
            key_dim: sizes.key(),
            value_dim: sizes.latent,
            scale: config.softmax_scale,
        };
        let rank = q_lora_rank.map(Axis::whole);
        let q_a = match (q_a, rank) {
            (Some((down, norm)), Some(rank)) => {
                Some((Dense::load(gpu, down, rank, d)?, Norm::load(gpu, norm, rank, inner_norm_eps)?))
            }
            _ => None,
        };
        let q = Dense::load(gpu, q, Axis::heads(num_heads, qk_nope_head_dim + qk_rope_head_dim), rank.unwrap_or(d))?;
        let (latent, rope) = (Axis::part(0, kv_lora_rank), Axis::part(kv_lora_rank, qk_rope_head_dim));
        let kv_a = Dense::stack(gpu, &[(kv_a, latent), (kv_a, rope)], d, Epilogue::Linear)?;
        let kv_a_norm = Norm::load(gpu, kv_a_norm, latent, inner_norm_eps)?;
        let [absorb, expand] = by_head(gpu, config, kv_b, &sizes)?;
        let latent = Self { shape, q_a, q, kv_a, kv_a_norm, absorb, expand };
        Ok((latent, Axis::heads(num_heads, v_head_dim)))
    }

    /// From the residual stream to the heads' output in `c`.
    pub(super) fn run(&self, step: Step<'_>, work: &mut Workspace) -> Result<()> {
        let Step { gpu, norm, batch, rope, layer } = step;
        let (stream, tokens) = (&gpu.stream, batch.tokens);
        let AttentionShape { num_heads, key_dim, value_dim: latent, .. } = self.shape;
        let order = batch.heads.as_ref().ok_or_else(mismatch)?;
        work.norm(gpu, norm, tokens)?;
        // Each step reads what is in c and writes b; then they change names.
        let Workspace { normed, a, b, c, bytes, .. } = work;

        let queries = [tokens, self.q.out()];
        if let Some((down, norm)) = &self.q_a {
            let (shape, rank) = ([tokens, down.out()], HeadRange { column: 0, num_heads: 1, head_dim: down.out() });
            down.run(stream, normed.part(0, [tokens, down.inner()])?, &mut a.part_mut(0, shape)?)?;
            norm.run_heads(stream, &mut a.part_mut(0, shape)?, rank)?;
            self.q.run(stream, a.part(0, shape)?, &mut c.part_mut(0, queries)?)?;
        } else {
            self.q.run(stream, normed.part(0, [tokens, self.q.inner()])?, &mut c.part_mut(0, queries)?)?;
        }
        let cached = [tokens, key_dim];
        self.kv_a.run(stream, normed.part(0, [tokens, self.kv_a.inner()])?, &mut a.part_mut(0, cached)?)?;

        product_by_head(stream, &self.absorb, order, c, b)?;
        std::mem::swap(b, c);
        if tokens > 1 {
            to_token_order(stream, order, key_dim, c, b)?;
            std::mem::swap(b, c);
        }
        let mut buffers = RopeBuffers {
            positions: batch.positions()?,
            queries: c.part_mut(0, [tokens, num_heads * key_dim])?,
            q: HeadRange { column: 0, num_heads, head_dim: key_dim },
            q_first: latent,
            q_norm: None,
            cache: Some(RopeCache {
                keys: Some(a.part(0, cached)?),
                k: HeadRange { column: 0, num_heads: 1, head_dim: key_dim },
                k_first: latent,
                k_norm: Some(self.kv_a_norm.of_heads()),
                values: None,
                v: HeadRange { column: 0, num_heads: 0, head_dim: 0 },
                rows: batch.rows()?,
                k_cache: layer.keys.part_mut(0, [batch.cache_rows, 1, key_dim])?,
                v_cache: layer.values.part_mut(0, [batch.cache_rows, 0, 0])?,
            }),
            clip: None,
        };
        rope_into(stream, rope, &mut buffers)?;
        let input = AttentionInput {
            q: c.part(0, [tokens, num_heads * key_dim])?,
            keys: layer.keys.view(),
            values: None,
            batch: batch.attention()?,
        };
        attend(gpu, &self.shape, &input, bytes, &mut b.part_mut(0, [tokens, num_heads * latent])?)?;
        std::mem::swap(b, c);
        product_by_head(stream, &self.expand, order, c, b)?;
        std::mem::swap(b, c);
        if tokens > 1 {
            to_token_order(stream, order, self.expand.shape().sizes()[1], c, b)?;
            std::mem::swap(b, c);
        }
        Ok(())
    }
}

/// `W_UK` and `W_UV` of every head, from rows `head * (nope + v)` of the checkpoint's `kv_b`, `[.., latent]`.
fn by_head(gpu: &Gpu, config: &Config, kv_b: &StoredLinear, sizes: &LatentSizes) -> Result<[Buffer<bf16>; 2]> {
    let &Attention::Latent { kv_lora_rank, qk_nope_head_dim: nope, qk_rope_head_dim, v_head_dim, .. } =
        &config.attention
    else {
        return Err(mismatch());
    };
    let (heads, key) = (sizes.num_heads, sizes.key());
    let mut absorb = gpu.zeros(Purpose::Weights, [heads, key, sizes.head])?;
    let mut expand = gpu.zeros(Purpose::Weights, [heads, sizes.value, sizes.latent])?;
    let (rows, per_head) = (kv_b.rows()?, nope + v_head_dim);
    let transposed = |values: &mut Vec<f32>, head: usize, out: &mut [bf16]| {
        out.fill(bf16::ZERO);
        for column in 0..nope {
            rows.read(head * per_head + column, values);
            values.iter().enumerate().for_each(|(row, value)| {
                out[row * sizes.head + column] = bf16::from_f32(*value);
            });
        }
        for element in 0..qk_rope_head_dim {
            out[(sizes.latent + element) * sizes.head + nope + element] = bf16::ONE;
        }
    };
    let pieces = [heads, key * sizes.head];
    gpu.staging().send(&gpu.stream, &mut absorb, 0, pieces, || vec![0.0; kv_lora_rank], transposed)?;
    for head in 0..heads {
        let (first, at) = (head * per_head + nope, head * sizes.value * sizes.latent);
        gpu.write(&mut expand, at, kv_b, Axis::part(first, v_head_dim), Axis::whole(kv_lora_rank))?;
    }
    Ok([absorb, expand])
}

/// `[T * H, in]` rows in token order through each head's `[out, in]`: `[H * T, out]`, head by head.
fn product_by_head(
    stream: &Stream,
    weights: &Tensor<bf16>,
    order: &HeadOrder,
    from: &Tensor<bf16>,
    to: &mut Tensor<bf16>,
) -> Result<()> {
    let &[_, out, inner] = weights.shape().sizes() else { return Err(mismatch()) };
    let slots = order.by_head()?;
    let rows = slots.shape().len();
    let input = GroupedGemmInput {
        x: from.part(0, [rows, inner])?,
        weights: weights.view(),
        bias: None,
        expert_offsets: order.offsets(),
        gather: Some(Gather { slots, topk: 1 }),
        epilogue: Epilogue::Linear,
        tile: Tile::Auto,
    };
    Ok(grouped_gemm_into(stream, &input, &mut to.part_mut(0, [rows, out])?)?)
}

/// Rows that lie head by head, token by token again.
fn to_token_order(
    stream: &Stream,
    order: &HeadOrder,
    width: usize,
    from: &Tensor<bf16>,
    to: &mut Tensor<bf16>,
) -> Result<()> {
    let slots: View<'_, u32> = order.by_token()?;
    let shape = [slots.shape().len(), width];
    Ok(permute_rows_into(stream, &from.part(0, shape)?, &slots, 1, &mut to.part_mut(0, shape)?)?)
}
