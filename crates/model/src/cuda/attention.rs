//! Attention on the GPU: projections, rotation and cache write, attention, output projection.
//!
//! Latent attention is absorbed: `q_nope W_UK` makes a query of the latent's width, which attends to the cached rows
//! `[latent; rotated key]` themselves, and what comes out goes through `W_UV` (DeepSeek-V2, arXiv 2405.04434, section 2.1.2). Both are
//! products by head, a grouped GEMM whose experts are the heads. `W_UK` has ones where the rotated elements pass through.

use anabranch::{
    cuda::{
        AttentionInput, DecodeProjections, Epilogue, Gather, GroupedGemmInput, HeadRange, RopeBuffers, RopeCache,
        Stream, Tensor, Tile, View, ViewMut, attention_into, attention_workspace, grouped_gemm_into, permute_rows_into,
        rope_into,
    },
    reference::AttentionShape,
};
use half::bf16;

use super::{
    cache::{CudaCache, DeviceBatch, HeadOrder, LayerCache},
    layers::{Dense, Norm},
    load::{Axis, pad},
    memory::{Buffer, Gpu, Purpose},
    workspace::Workspace,
};
use crate::{
    Config, Error, Result,
    config::{Attention, QkNorm},
    weights::{AttentionWeights, StoredLinear},
};

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

#[derive(Debug)]
struct Grouped {
    shape: AttentionShape,
    /// Queries, keys, values.
    qkv: Dense,
    /// Of each head of queries and of keys, where they are rotated.
    head_norms: Option<[Norm; 2]>,
    /// Of all of them at once, before that.
    whole_norms: Option<[Norm; 2]>,
    clip: Option<f32>,
}

#[derive(Debug)]
struct Latent {
    shape: AttentionShape,
    q_a: Option<(Dense, Norm)>,
    q: Dense,
    kv_a: Dense,
    kv_a_norm: Norm,
    /// `[H, key_dim, head]`.
    absorb: Buffer<bf16>,
    /// `[H, v, latent]`.
    expand: Buffer<bf16>,
}

/// Sizes of latent attention as the device has them.
#[derive(Debug, Clone, Copy)]
pub(super) struct LatentSizes {
    pub(super) num_heads: usize,
    /// Of a projected query head.
    pub(super) head: usize,
    pub(super) latent: usize,
    rope: usize,
    pub(super) value: usize,
}

impl LatentSizes {
    pub(super) fn of(attention: &Attention) -> Option<Self> {
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
    pub(super) fn key(&self) -> usize {
        self.latent + self.rope
    }
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

/// Heads of latent attention.
pub(super) fn latent_heads(config: &Config) -> Option<usize> {
    LatentSizes::of(&config.attention).map(|sizes| sizes.num_heads)
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
    rope: &'a anabranch::cuda::RopeTable,
    layer: &'a mut LayerCache,
}

fn mismatch() -> Error {
    Error::Input("an attention's weights are of another kind than its configuration".to_owned())
}

impl Grouped {
    /// The weights, and how the output projection's columns lie.
    fn load(gpu: &Gpu, config: &Config, weights: &AttentionWeights, d: Axis) -> Result<(Self, Axis)> {
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
    fn run(&self, step: Step<'_>, work: &mut Workspace) -> Result<()> {
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
            positions: batch.positions()?,
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
                rows: batch.rows()?,
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
            batch: batch.attention()?,
        };
        attend(gpu, &self.shape, &input, &mut work.bytes, &mut work.c.part_mut(0, [tokens, width])?)?;
        Ok(())
    }
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

impl Latent {
    /// The weights, and how the output projection's columns lie.
    fn load(gpu: &Gpu, config: &Config, weights: &AttentionWeights, d: Axis) -> Result<(Self, Axis)> {
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
    fn run(&self, step: Step<'_>, work: &mut Workspace) -> Result<()> {
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
