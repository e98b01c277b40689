//! Latent attention, in two ways over one cache, whose rows are `[latent; rotated key]`.
//!
//! Absorbed, for few queries: `q_nope W_UK` makes a query of the latent's width, which attends to the cached rows
//! themselves, and what comes out goes through `W_UV` (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Both are
//! products by head, a grouped GEMM whose experts are the heads. `W_UK` has ones where the rotated elements pass through.
//!
//! Expanded, for many, whose attention costs more than what it takes to make keys and values of every head out of all latents that they
//! see, in one product: queries and output are then as they are in attention of any other kind. `expansion.rs` decides.

use anabranch::{
    cuda::{
        AttentionInput, Epilogue, Gather, GroupedGemmInput, HeadRange, RopeBuffers, RopeCache, Stream, Tensor, Tile,
        View, ViewMut, grouped_gemm_into, permute_rows_into, rope_into,
    },
    reference::AttentionShape,
};
use half::bf16;

use super::{
    super::{
        layers::{Dense, Norm},
        load::Axis,
        memory::{Buffer, Gpu},
        parts::{HeadOrder, LatentBatch, Part},
        workspace::Workspace,
    },
    LatentSizes, Step, attend,
    latent_weights::{all_heads, by_head},
    mismatch,
};
use crate::{Config, Result, config::Attention, weights::AttentionWeights};

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
    /// `[keys and values of all heads, key_dim]`, where there are kernels for these.
    all_heads: Option<Buffer<bf16>>,
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
        let all_heads = sizes.can_expand().then(|| all_heads(gpu, config, kv_b, &sizes)).transpose()?;
        let latent = Self { shape, q_a, q, kv_a, kv_a_norm, absorb, expand, all_heads };
        Ok((latent, Axis::heads(num_heads, v_head_dim)))
    }

    /// From the residual stream to the heads' output in `c`.
    pub(super) fn run(&self, mut step: Step<'_>, work: &mut Workspace) -> Result<()> {
        let batch = step.batch;
        let latent = batch.latent.as_ref().ok_or_else(mismatch)?;
        work.norm(step.gpu, step.norm, batch.tokens)?;
        // In this order: the first part's output is all that b and c hold then.
        if !latent.absorbed.is_empty() {
            self.attend_to_latents(&mut step, latent, work)?;
        }
        if !latent.expanded.is_empty() {
            self.attend_to_heads(&mut step, latent, work)?;
        }
        Ok(())
    }

    /// The first part's output to the beginning of `c`.
    fn attend_to_latents(&self, step: &mut Step<'_>, latent: &LatentBatch, work: &mut Workspace) -> Result<()> {
        let (gpu, batch, part, order) = (step.gpu, step.batch, &latent.absorbed, &latent.order);
        let (stream, tokens) = (&gpu.stream, part.tokens.len());
        let AttentionShape { num_heads, key_dim, value_dim, .. } = self.shape;
        // Each step reads what is in c and writes b; then they change names.
        let Workspace { normed, a, b, c, bytes, .. } = work;
        self.project(stream, part, normed, a, &mut c.part_mut(0, [tokens, self.q.out()])?)?;
        product_by_head(stream, &self.absorb, order, c, b)?;
        std::mem::swap(b, c);
        if tokens > 1 {
            to_token_order(stream, order, key_dim, c, b)?;
            std::mem::swap(b, c);
        }
        let heads = HeadRange { column: 0, num_heads, head_dim: key_dim };
        self.rotate(step, part, a, (c.part_mut(0, [tokens, heads.width()])?, heads, value_dim))?;
        let input = AttentionInput {
            q: c.part(0, [tokens, heads.width()])?,
            keys: step.layer.keys.view(),
            values: None,
            batch: batch.attention(part)?,
        };
        attend(gpu, &self.shape, &input, bytes, &mut b.part_mut(0, [tokens, num_heads * value_dim])?)?;
        std::mem::swap(b, c);
        product_by_head(stream, &self.expand, order, c, b)?;
        std::mem::swap(b, c);
        if tokens > 1 {
            to_token_order(stream, order, self.expand.shape().sizes()[1], c, b)?;
            std::mem::swap(b, c);
        }
        Ok(())
    }

    /// The last part's output to `c`, behind the first's. Its keys may be of any pass before: the cache has them as latents, and all
    /// that a segment sees become heads.
    fn attend_to_heads(&self, step: &mut Step<'_>, latent: &LatentBatch, work: &mut Workspace) -> Result<()> {
        let (gpu, batch, part, sizes) = (step.gpu, step.batch, &latent.expanded, &latent.sizes);
        let (stream, tokens) = (&gpu.stream, part.tokens.len());
        let weight = self.all_heads.as_ref().ok_or_else(mismatch)?.view();
        let Workspace { normed, a, b, c, bytes, expanded, .. } = work;
        self.project(stream, part, normed, a, &mut b.part_mut(0, [tokens, sizes.keys()])?)?;
        let heads = HeadRange { column: 0, num_heads: sizes.num_heads, head_dim: sizes.head };
        self.rotate(step, part, a, (b.part_mut(0, [tokens, sizes.keys()])?, heads, sizes.nope))?;

        let (keys, values) = expanded.expand(stream, sizes, &step.layer.keys, &batch.tables(part)?, weight)?;
        let q = b.part(0, [tokens, sizes.keys()])?;
        let input = AttentionInput { q, keys, values: Some(values), batch: latent.expanded_attention(batch)? };
        let shape =
            AttentionShape { num_kv_heads: sizes.num_heads, key_dim: sizes.head, value_dim: sizes.value, ..self.shape };
        let width = sizes.num_heads * sizes.value;
        attend(gpu, &shape, &input, bytes, &mut c.part_mut(part.tokens.start * width, [tokens, width])?)
    }

    /// Queries of a part's tokens, as they are projected, and in `a` their rows of the cache; neither is rotated.
    fn project(
        &self,
        stream: &Stream,
        part: &Part,
        normed: &Tensor<bf16>,
        a: &mut Tensor<bf16>,
        queries: &mut ViewMut<'_, bf16>,
    ) -> Result<()> {
        let (tokens, d) = (part.tokens.len(), self.kv_a.inner());
        let x = || normed.part(part.tokens.start * d, [tokens, d]);
        if let Some((down, norm)) = &self.q_a {
            let (shape, rank) = ([tokens, down.out()], HeadRange { column: 0, num_heads: 1, head_dim: down.out() });
            down.run(stream, x()?, &mut a.part_mut(0, shape)?)?;
            norm.run_heads(stream, &mut a.part_mut(0, shape)?, rank)?;
            self.q.run(stream, a.part(0, shape)?, queries)?;
        } else {
            self.q.run(stream, x()?, queries)?;
        }
        self.kv_a.run(stream, x()?, &mut a.part_mut(0, [tokens, self.kv_a.out()])?)
    }

    /// Rotates a part's queries, which come with where they are and their first rotated element, and writes its rows to the cache.
    fn rotate(
        &self,
        step: &mut Step<'_>,
        part: &Part,
        a: &Tensor<bf16>,
        (queries, q, q_first): (ViewMut<'_, bf16>, HeadRange, usize),
    ) -> Result<()> {
        let AttentionShape { key_dim, value_dim: latent, .. } = self.shape;
        let Step { gpu, batch, rope, layer, .. } = step;
        let mut buffers = RopeBuffers {
            positions: batch.positions(part)?,
            queries,
            q,
            q_first,
            q_norm: None,
            cache: Some(RopeCache {
                keys: Some(a.part(0, [part.tokens.len(), key_dim])?),
                k: HeadRange { column: 0, num_heads: 1, head_dim: key_dim },
                k_first: latent,
                k_norm: Some(self.kv_a_norm.of_heads()),
                values: None,
                v: HeadRange { column: 0, num_heads: 0, head_dim: 0 },
                rows: batch.rows(part)?,
                k_cache: layer.keys.part_mut(0, [batch.cache_rows, 1, key_dim])?,
                v_cache: layer.values.part_mut(0, [batch.cache_rows, 0, 0])?,
            }),
            clip: None,
        };
        Ok(rope_into(&gpu.stream, rope, &mut buffers)?)
    }
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
