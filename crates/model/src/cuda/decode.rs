//! A decode step of one sequence in one launch, for models that the kernel takes.

use anabranch::{
    cuda::{Arch, DecodeLayer, DecodeSequence, DecodeShape, DecodeStep},
    reference::AttentionShape,
};

use super::{
    Cuda,
    attention::LatentSizes,
    cache::{CudaCache, LayerCache},
    load::pad,
    memory::Gpu,
    moe,
};
use crate::{
    Block, Config, Result,
    blocks::BLOCK_SIZE,
    config::{Attention, FeedForward, QkNorm},
};

/// Bytes of weights that a token reads in a layer, up to which one launch for all layers is faster than one for each step: where reading
/// takes longer, what lies between counts for less, and blocks that share memory unevenly wait longer for one another.
const MOST_BYTES: usize = 256 << 20;
/// Contexts up to which it is, of heads that are cached as they are and of latents: beyond, the attention of its own is faster.
const MOST_CONTEXT: [usize; 2] = [512, 2048];

/// A model as the kernel sees it, if all of it is of a kind that it knows.
fn shape(config: &Config) -> Option<DecodeShape> {
    let whole = |width: usize| pad(width) == width;
    let scale = config.softmax_scale;
    let (attention, latent, rotary_first, head_norm_eps) = match (&config.attention, LatentSizes::of(&config.attention))
    {
        (
            &Attention::Grouped {
                num_heads,
                num_kv_heads,
                head_dim,
                qkv_bias: false,
                output_bias: false,
                qk_norm: QkNorm::None | QkNorm::PerHead,
                clip_qkv: None,
            },
            _,
        ) if whole(head_dim) => {
            let shape = AttentionShape { num_heads, num_kv_heads, key_dim: head_dim, value_dim: head_dim, scale };
            (shape, None, 0, config.rms_norm_eps)
        }
        (
            &Attention::Latent {
                q_lora_rank: None, bias: false, kv_lora_rank, qk_rope_head_dim, inner_norm_eps, ..
            },
            Some(sizes),
        ) if whole(kv_lora_rank) && whole(qk_rope_head_dim) => {
            let shape = AttentionShape {
                num_heads: sizes.num_heads,
                num_kv_heads: 1,
                key_dim: sizes.key(),
                value_dim: sizes.latent,
                scale,
            };
            (shape, Some([sizes.head, sizes.value]), sizes.latent, inner_norm_eps)
        }
        _ => return None,
    };
    let experts = moe::experts(config);
    if config.mlp_bias || !whole(config.hidden_size) || experts.is_some_and(|experts| experts.apart || experts.gated) {
        return None;
    }
    let dense = config.layers.contains(&FeedForward::Dense);
    let shape = DecodeShape {
        num_layers: config.layers.len(),
        hidden_size: config.hidden_size,
        norm_eps: config.rms_norm_eps,
        attention,
        latent,
        head_norm_eps,
        rotary_first,
        routing: experts.map(|experts| experts.shape.routing),
        num_shared: experts.map_or(0, |experts| experts.shape.num_shared),
        intermediate_size: experts.map_or(0, |experts| experts.shape.intermediate_size),
        dense_size: if dense { pad(config.intermediate_size) } else { 0 },
    };
    (bytes(&shape) <= MOST_BYTES).then_some(shape)
}

/// Bytes of weights that a token reads in the layer that has most.
fn bytes(shape: &DecodeShape) -> usize {
    let AttentionShape { num_heads, num_kv_heads, key_dim, value_dim, .. } = shape.attention;
    let heads = match shape.latent {
        Some([q_dim, o_dim]) => num_heads * (q_dim + o_dim) + key_dim,
        None => (num_heads + 2 * num_kv_heads) * key_dim + num_heads * value_dim,
    };
    let slots = shape.routing.map_or(0, |routing| routing.topk() + shape.num_shared);
    2 * shape.hidden_size * (heads + 3 * (slots * shape.intermediate_size).max(shape.dense_size))
}

/// The step of a model, where there is one.
pub(super) fn step(gpu: &Gpu, config: &Config) -> Result<Option<DecodeStep>> {
    match shape(config) {
        Some(shape) => Ok(DecodeStep::new(&gpu.stream, &shape, &config.rope, Arch::Auto)?),
        None => Ok(None),
    }
}

/// Runs all blocks, if the pass is of one token and the model has a step: true if it did.
pub(super) fn run(gpu: &Gpu, blocks: &[Block<Cuda>], cache: &mut CudaCache) -> Result<bool> {
    let CudaCache { layers, rope, batch, work, step, .. } = cache;
    let most = MOST_CONTEXT[usize::from(batch.latent.is_some())];
    let is_short = batch.tokens == 1 && batch.all.max_kv_len <= most;
    let Some(step) = step.as_mut().filter(|_| is_short) else { return Ok(false) };
    let rows = batch.cache_rows;
    let pairs = blocks.iter().zip(layers);
    let mut layers = pairs.map(|(block, cache)| layer(block, cache, rows)).collect::<Result<Vec<_>>>()?;
    let attention = batch.attention(&batch.all)?;
    let sequence = DecodeSequence {
        position: batch.positions(&batch.all)?,
        cache_row: batch.rows(&batch.all)?,
        kv_length: attention.kv_lengths,
        table_start: attention.table_starts,
        block_table: attention.block_table,
        block_size: BLOCK_SIZE,
    };
    let x = &mut work.residual.begin().part_mut(0, [1, blocks[0].attention.width()])?;
    step.run_into(&gpu.stream, rope, &mut layers, &sequence, x)?;
    Ok(true)
}

fn layer<'a>(block: &'a Block<Cuda>, cache: &'a mut LayerCache, rows: usize) -> Result<DecodeLayer<'a>> {
    let (projections, output, [key_width, value_width]) = block.attention.of_step();
    let (router, gate_up, down) = block.feed_forward.of_step();
    Ok(DecodeLayer {
        attention_norm: block.attention_norm.weight(),
        projections,
        output,
        k_cache: cache.keys.part_mut(0, [rows, key_width])?,
        v_cache: cache.values.part_mut(0, [rows, value_width])?,
        feed_forward_norm: block.feed_forward_norm.weight(),
        router,
        gate_up,
        down,
    })
}
