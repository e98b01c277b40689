//! candle's Qwen3-MoE model with the MoE layer swapped: the transformer is built from candle's parts and reads the same
//! tensors as `candle_transformers::models::qwen3_moe`, only [`FusedMoe`] is this crate's. On random weights, the logits of
//! both are compared, and a few tokens are drawn greedily.
//!
//!     cargo run --release --example qwen3_moe

use std::collections::HashMap;

use anabranch_candle::FusedMoe;
use candle_core::{D, DType, Device, IndexOp, Module, Result, Tensor};
use candle_nn::{Activation, Embedding, Linear, RmsNorm, VarBuilder, embedding, linear_no_bias, rms_norm};
use candle_transformers::{
    fused_moe::MoeCfg,
    models::qwen3_moe::{Config, ModelForCausalLM},
};

/// A small model of the family's shape.
fn config() -> Config {
    Config {
        vocab_size: 512,
        hidden_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        head_dim: 64,
        attention_bias: false,
        num_key_value_heads: 2,
        max_position_embeddings: 256,
        sliding_window: None,
        max_window_layers: 0,
        tie_word_embeddings: false,
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
        decoder_sparse_step: 1,
        moe_intermediate_size: 128,
        num_experts_per_tok: 4,
        num_experts: 16,
        norm_topk_prob: true,
    }
}

struct Layer {
    norms: [RmsNorm; 2],
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    qk_norms: [RmsNorm; 2],
    moe: FusedMoe,
}

struct Model {
    config: Config,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    cos: Tensor,
    sin: Tensor,
}

impl Layer {
    fn new(config: &Config, vb: &VarBuilder) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let attention = vb.pp("self_attn");
        let moe = MoeCfg {
            hidden_size: hidden,
            num_experts: config.num_experts,
            num_experts_per_tok: config.num_experts_per_tok,
            moe_intermediate_size: config.moe_intermediate_size,
            norm_topk_prob: config.norm_topk_prob,
            act: config.hidden_act,
            decoder_sparse_step: None,
        };
        let heads = |number: usize, name| linear_no_bias(hidden, number * config.head_dim, attention.pp(name));
        Ok(Self {
            norms: [
                rms_norm(hidden, eps, vb.pp("input_layernorm"))?,
                rms_norm(hidden, eps, vb.pp("post_attention_layernorm"))?,
            ],
            q: heads(config.num_attention_heads, "q_proj")?,
            k: heads(config.num_key_value_heads, "k_proj")?,
            v: heads(config.num_key_value_heads, "v_proj")?,
            o: linear_no_bias(config.num_attention_heads * config.head_dim, hidden, attention.pp("o_proj"))?,
            qk_norms: [
                rms_norm(config.head_dim, eps, attention.pp("q_norm"))?,
                rms_norm(config.head_dim, eps, attention.pp("k_norm"))?,
            ],
            moe: FusedMoe::new(&moe, vb.pp("mlp"), vb.dtype())?,
        })
    }
}

impl Model {
    fn new(config: Config, vb: &VarBuilder) -> Result<Self> {
        let layers = (0..config.num_hidden_layers).map(|layer| Layer::new(&config, &vb.pp("model.layers").pp(layer)));
        let half = config.head_dim / 2;
        let frequencies: Vec<f32> =
            (0..half).map(|i| config.rope_theta.powf(-2.0 * i as f64 / config.head_dim as f64) as f32).collect();
        let positions = Tensor::arange(0_u32, config.max_position_embeddings as u32, vb.device())?;
        let positions = positions.to_dtype(DType::F32)?.unsqueeze(1)?;
        let angles = positions.matmul(&Tensor::from_vec(frequencies, (1, half), vb.device())?)?;
        Ok(Self {
            embedding: embedding(config.vocab_size, config.hidden_size, vb.pp("model.embed_tokens"))?,
            layers: layers.collect::<Result<_>>()?,
            norm: rms_norm(config.hidden_size, config.rms_norm_eps, vb.pp("model.norm"))?,
            head: linear_no_bias(config.hidden_size, config.vocab_size, vb.pp("lm_head"))?,
            cos: angles.cos()?.to_dtype(vb.dtype())?,
            sin: angles.sin()?.to_dtype(vb.dtype())?,
            config,
        })
    }

    /// Logits of the last of some tokens, `[1, length]`.
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let (_, length) = ids.dims2()?;
        let mut x = self.embedding.forward(ids)?;
        for layer in &self.layers {
            x = (&x + self.attention(layer, &layer.norms[0].forward(&x)?)?)?;
            x = (&x + layer.moe.forward(&layer.norms[1].forward(&x)?, length > 1)?)?;
        }
        self.norm.forward(&x)?.narrow(1, length - 1, 1)?.apply(&self.head)
    }

    fn attention(&self, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let (batch, length, _) = x.dims3()?;
        let (q_heads, kv_heads) = (self.config.num_attention_heads, self.config.num_key_value_heads);
        let heads = |projection: &Linear, heads: usize| {
            x.apply(projection)?.reshape((batch, length, heads, self.config.head_dim))?.transpose(1, 2)?.contiguous()
        };
        let rotated = |projection: &Linear, norm: &RmsNorm, number: usize| {
            let (cos, sin) = (self.cos.narrow(0, 0, length)?, self.sin.narrow(0, 0, length)?);
            candle_nn::rotary_emb::rope(&norm.forward(&heads(projection, number)?)?, &cos, &sin)
        };
        let repeated = |tensor: Tensor| candle_transformers::utils::repeat_kv(tensor, q_heads / kv_heads)?.contiguous();
        let q = rotated(&layer.q, &layer.qk_norms[0], q_heads)?;
        let k = repeated(rotated(&layer.k, &layer.qk_norms[1], kv_heads)?)?;
        let v = repeated(heads(&layer.v, kv_heads)?)?;
        let scores = (q.matmul(&k.transpose(2, 3)?)? / (self.config.head_dim as f64).sqrt())?;
        let masked: Vec<f32> =
            (0..length * length).map(|i| if i % length > i / length { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(masked, (1, 1, length, length), x.device())?.to_dtype(x.dtype())?;
        let weights = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask)?)?;
        weights.matmul(&v)?.transpose(1, 2)?.reshape((batch, length, ()))?.apply(&layer.o)
    }
}

/// Random weights under the checkpoint's names.
fn weights(config: &Config, device: &Device) -> Result<HashMap<String, Tensor>> {
    let mut tensors = HashMap::new();
    let mut insert = |name: String, shape: &[usize]| -> Result<()> {
        let tensor = if name.ends_with("norm.weight") {
            Tensor::ones(shape, DType::BF16, device)?
        } else {
            Tensor::randn(0_f32, 0.08, shape, device)?.to_dtype(DType::BF16)?
        };
        tensors.insert(name, tensor);
        Ok(())
    };
    let (hidden, width) = (config.hidden_size, config.moe_intermediate_size);
    let (queries, keys) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    insert("model.embed_tokens.weight".to_owned(), &[config.vocab_size, hidden])?;
    insert("model.norm.weight".to_owned(), &[hidden])?;
    insert("lm_head.weight".to_owned(), &[config.vocab_size, hidden])?;
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        insert(name("input_layernorm"), &[hidden])?;
        insert(name("post_attention_layernorm"), &[hidden])?;
        insert(name("self_attn.q_proj"), &[queries, hidden])?;
        insert(name("self_attn.k_proj"), &[keys, hidden])?;
        insert(name("self_attn.v_proj"), &[keys, hidden])?;
        insert(name("self_attn.o_proj"), &[hidden, queries])?;
        insert(name("self_attn.q_norm"), &[config.head_dim])?;
        insert(name("self_attn.k_norm"), &[config.head_dim])?;
        insert(name("mlp.gate"), &[config.num_experts, hidden])?;
        for expert in 0..config.num_experts {
            insert(name(&format!("mlp.experts.{expert}.gate_proj")), &[width, hidden])?;
            insert(name(&format!("mlp.experts.{expert}.up_proj")), &[width, hidden])?;
            insert(name(&format!("mlp.experts.{expert}.down_proj")), &[hidden, width])?;
        }
    }
    Ok(tensors)
}

fn main() -> Result<()> {
    let device = Device::new_cuda(0)?;
    device.set_seed(2026)?;
    let config = config();
    let vb = VarBuilder::from_tensors(weights(&config, &device)?, DType::BF16, &device);
    let mut theirs = ModelForCausalLM::new(&config, vb.clone())?;
    let ours = Model::new(config, &vb)?;

    let mut ids: Vec<u32> = (0..16).map(|i| i * 31 % 512).collect();
    let tensor = |ids: &[u32]| Tensor::new(ids, &device)?.unsqueeze(0);
    let logits = |tensor: &Tensor| tensor.i((0, 0))?.to_dtype(DType::F32);
    let (left, right) = (logits(&ours.forward(&tensor(&ids)?)?)?, logits(&theirs.forward(&tensor(&ids)?, 0)?)?);
    let norm = |tensor: &Tensor| tensor.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
    println!("relative difference of the logits: {:.1e}", norm(&(&left - &right)?)? / norm(&right)?);
    for _ in 0..8 {
        let next = logits(&ours.forward(&tensor(&ids)?)?)?.argmax(D::Minus1)?.to_scalar::<u32>()?;
        ids.push(next);
    }
    println!("tokens {:?}", &ids[16..]);
    Ok(())
}
