//! Feed-forward parts on the GPU: one SwiGLU, or routed and shared experts.

use anabranch::{
    MAX_EXPERTS, MAX_TOPK, Routing,
    cuda::{
        Arch, CombineInput, DecodeRouter, Epilogue, MoeBlock, MoeBuffers, MoeInput, MoeLayer, MoeRouting, MoeShape,
        RouterLogitsInput, Stream, Tensor, TopkBuffers, View, ViewMut, add_into, combine_into, router_logits_into,
    },
    reference::topk_weights,
};
use half::bf16;

use super::{
    cache::CudaCache,
    layers::{Dense, Norm},
    load::{Axis, pad},
    memory::{Buffer, Gpu, Purpose},
    workspace::{Residual, Workspace},
};
use crate::{
    Config, Error, Result,
    backend::{Routed, TopkIds},
    weights::{FeedForwardWeights, StoredLinear, SwiGluWeights},
};

/// A feed-forward part's weights on the GPU.
#[derive(Debug)]
pub struct CudaFeedForward(Kind);

#[derive(Debug)]
enum Kind {
    Dense(Box<SwiGlu>),
    Moe(Box<Moe>),
}

/// `(silu(x W_gate^T) * (x W_up^T)) W_down^T`, biases added to each product where a model has them.
#[derive(Debug)]
struct SwiGlu {
    gate_up: Dense,
    down: Dense,
}

#[derive(Debug)]
struct Moe {
    routing: Routing,
    /// `[E, d]`.
    gate: Buffer<bf16>,
    selection_bias: Option<Buffer<f32>>,
    /// `[E + S, 2 n, d]` and `[E + S, d, n]`.
    gate_up: Buffer<bf16>,
    down: Buffer<bf16>,
    /// Shared experts that are not experts of the layer.
    apart: Option<SwiGlu>,
    /// `[1, d]`: the shared experts' gate.
    shared_gate: Option<Buffer<bf16>>,
}

/// How a model's experts are computed: the same in every layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Experts {
    pub(super) shape: MoeShape,
    /// Whether shared experts are a product of their own, because their width is not a multiple of an expert's or they are too many.
    pub(super) apart: bool,
    /// Whether a gate scales them.
    pub(super) gated: bool,
}

/// The experts of a configuration that has some.
pub(super) fn experts(config: &Config) -> Option<Experts> {
    let moe = config.moe.as_ref()?;
    let (width, routing) = (moe.intermediate_size, moe.routing);
    let shared = moe.shared.map_or(0, |shared| shared.intermediate_size);
    let room = (MAX_EXPERTS - routing.num_experts()).min(MAX_TOPK - routing.topk());
    let within = shared.is_multiple_of(width) && shared / width <= room;
    let shape = MoeShape {
        routing,
        hidden_size: pad(config.hidden_size),
        intermediate_size: pad(width),
        num_shared: if within { shared / width } else { 0 },
    };
    Some(Experts { shape, apart: shared > 0 && !within, gated: moe.shared.is_some_and(|shared| shared.gated) })
}

impl Experts {
    /// The routed experts' plan for up to `tokens` tokens.
    pub(super) fn plan(&self, gpu: &Gpu, tokens: usize) -> Result<MoeLayer> {
        Ok(MoeLayer::plan(gpu.stream.device(), &self.shape, tokens, Arch::Auto)?)
    }
}

impl CudaFeedForward {
    pub(super) fn load(gpu: &Gpu, config: &Config, weights: &FeedForwardWeights) -> Result<Self> {
        let kind = match weights {
            FeedForwardWeights::Dense(weights) => Kind::Dense(Box::new(SwiGlu::load(gpu, config, weights)?)),
            FeedForwardWeights::Moe { gate, selection_bias, experts, shared } => {
                let bias = selection_bias.as_deref();
                Kind::Moe(Box::new(Moe::load(gpu, config, gate, bias, experts, shared.as_ref())?))
            }
        };
        Ok(Self(kind))
    }

    /// What a step of all layers wants to know: the router, if there is one, and the weights of both products.
    pub(super) fn of_step(&self) -> (Option<DecodeRouter<'_>>, View<'_, bf16>, View<'_, bf16>) {
        match &self.0 {
            Kind::Dense(dense) => (None, dense.gate_up.weight(), dense.down.weight()),
            Kind::Moe(moe) => {
                let selection_bias = moe.selection_bias.as_ref().map(|bias| bias.view());
                let router = DecodeRouter { gate: moe.gate.view(), selection_bias };
                (Some(router), moe.gate_up.view(), moe.down.view())
            }
        }
    }

    /// From the residual stream to `delta`.
    pub(super) fn run(&self, gpu: &Gpu, norm: &Norm, routing: &mut Routed<'_>, cache: &mut CudaCache) -> Result<()> {
        let (tokens, work) = (cache.batch.tokens, &mut cache.work);
        match &self.0 {
            Kind::Dense(dense) => {
                let Workspace { residual, normed, a, .. } = work;
                let (d, n) = (dense.down.out(), dense.gate_up.out());
                let h = &mut a.part_mut(0, [tokens, n])?;
                residual.norm_product(&gpu.stream, norm, &dense.gate_up, normed, tokens, h)?;
                dense.down.run(&gpu.stream, a.part(0, [tokens, n])?, &mut residual.delta.part_mut(0, [tokens, d])?)
            }
            // A gate of the shared experts, and a routing from elsewhere, come between the norm and the layer.
            Kind::Moe(moe) if moe.shared_gate.is_none() && routing.given.is_none() => {
                moe.run_block(gpu, norm, tokens, routing, work)
            }
            Kind::Moe(moe) => {
                work.norm(gpu, norm, tokens)?;
                moe.run(gpu, tokens, routing, work)
            }
        }
    }
}

impl SwiGlu {
    fn load(gpu: &Gpu, config: &Config, weights: &SwiGluWeights) -> Result<Self> {
        let [n, _] = weights.gate.shape()?;
        let (n, d) = (Axis::whole(n), Axis::whole(config.hidden_size));
        let gate_up = Dense::stack(gpu, &[(&weights.gate, n), (&weights.up, n)], d, Epilogue::SwiGlu)?;
        Ok(Self { gate_up, down: Dense::load(gpu, &weights.down, d, n)? })
    }

    fn run(
        &self,
        stream: &Stream,
        tokens: usize,
        x: &Tensor<bf16>,
        h: &mut Tensor<bf16>,
        y: &mut Tensor<bf16>,
    ) -> Result<()> {
        let (d, n) = (self.down.out(), self.gate_up.out());
        self.gate_up.run(stream, x.part(0, [tokens, d])?, &mut h.part_mut(0, [tokens, n])?)?;
        self.down.run(stream, h.part(0, [tokens, n])?, &mut y.part_mut(0, [tokens, d])?)
    }
}

impl Moe {
    fn load(
        gpu: &Gpu,
        config: &Config,
        gate: &StoredLinear,
        selection_bias: Option<&[f32]>,
        experts: &[SwiGluWeights],
        shared: Option<&(SwiGluWeights, Option<StoredLinear>)>,
    ) -> Result<Self> {
        let (Some(Experts { shape, .. }), Some(moe)) = (self::experts(config), &config.moe) else {
            return Err(Error::Input("a layer has routed experts, but the configuration describes none".to_owned()));
        };
        let MoeShape { routing, hidden_size, intermediate_size, num_shared } = shape;
        let (width, d) = (moe.intermediate_size, Axis::whole(config.hidden_size));
        let gate = gpu.load(gate, Axis::exact(routing.num_experts()), d)?;
        let selection_bias = match selection_bias {
            Some(bias) => Some(gpu.upload(Purpose::Weights, [bias.len()], bias)?),
            None => None,
        };
        let all = experts.len() + num_shared;
        let mut gate_up = gpu.zeros(Purpose::Weights, [all, 2 * intermediate_size, hidden_size])?;
        let mut down = gpu.zeros(Purpose::Weights, [all, hidden_size, intermediate_size])?;
        // A wide shared expert is as many of the layer's width, one after another.
        let routed = experts.iter().map(|weights| (weights, 0));
        let split = shared.iter().flat_map(|(weights, _)| (0..num_shared).map(move |s| (weights, s * width)));
        for (expert, (weights, first)) in routed.chain(split).enumerate() {
            let (n, at) = (Axis::part(first, width), expert * intermediate_size * hidden_size);
            gpu.write(&mut gate_up, 2 * at, &weights.gate, n, d)?;
            gpu.write(&mut gate_up, 2 * at + intermediate_size * hidden_size, &weights.up, n, d)?;
            gpu.write(&mut down, at, &weights.down, d, n)?;
        }
        let apart = match shared {
            Some((weights, _)) if num_shared == 0 => Some(SwiGlu::load(gpu, config, weights)?),
            _ => None,
        };
        let shared_gate = match shared {
            Some((_, Some(gate))) => Some(gpu.load(gate, Axis::exact(1), d)?),
            _ => None,
        };
        Ok(Self { routing, gate, selection_bias, gate_up, down, apart, shared_gate })
    }

    /// Norm, gate product and layer in one call.
    fn run_block(
        &self,
        gpu: &Gpu,
        norm: &Norm,
        tokens: usize,
        routed: &mut Routed<'_>,
        work: &mut Workspace,
    ) -> Result<()> {
        let stream = &gpu.stream;
        let (experts, topk) = (self.routing.num_experts(), self.routing.topk());
        let Workspace { residual, normed, a, b, scores, bytes, moe, .. } = work;
        let Residual { x, delta, next_delta, pending, .. } = residual;
        let shape = [tokens, self.gate.shape().sizes()[1]];
        let mut taken =
            if routed.wanted { Some((stream.zeros([tokens, topk])?, stream.zeros([tokens, topk])?)) } else { None };
        let mut block = MoeBlock {
            residual: x.part_mut(0, shape)?,
            delta: if *pending { Some(delta.part(0, shape)?) } else { None },
            norm_weight: norm.weight(),
            norm_eps: norm.eps(),
            gate: self.gate.view(),
            selection_bias: self.selection_bias.as_ref().map(|bias| bias.view()),
            gate_up: self.gate_up.view(),
            down: self.down.view(),
            x: normed.part_mut(0, shape)?,
            logits: scores.part_mut(0, [tokens, experts])?,
            topk: taken.as_mut().map(topk_buffers),
            out: next_delta.part_mut(0, shape)?,
        };
        planned(moe.as_ref())?.forward_block_into(stream, &mut block, &mut bytes.view_mut())?;
        std::mem::swap(delta, next_delta);
        if let Some(apart) = &self.apart {
            apart.run(stream, tokens, normed, a, b)?;
            add_into(stream, &mut delta.part_mut(0, shape)?, &b.part(0, shape)?)?;
        }
        if let Some((ids, _)) = taken {
            let ids = TopkIds { ids: stream.download(&ids.view())?, topk };
            routed.taken = Some((ids, stream.download(&scores.part(0, [tokens, experts])?)?));
        }
        Ok(())
    }

    /// From `normed` to `delta`, for what stands between the norm and the layer.
    fn run(&self, gpu: &Gpu, tokens: usize, routed: &mut Routed<'_>, work: &mut Workspace) -> Result<()> {
        let stream = &gpu.stream;
        let (experts, topk) = (self.routing.num_experts(), self.routing.topk());
        let Workspace { residual, normed, a, b, c, scores, gates, order, ones, bytes, moe, .. } = work;
        let delta = &mut residual.delta;
        let shape = [tokens, self.gate.shape().sizes()[1]];
        let x = || normed.part(0, shape);

        gate_product(stream, x()?, &self.gate, &mut scores.part_mut(0, [tokens, experts])?)?;
        if let Some(gate) = &self.shared_gate {
            gate_product(stream, x()?, gate, &mut gates.part_mut(0, [tokens, 1])?)?;
        }
        let shared_gate = || self.shared_gate.as_ref().map(|_| gates.part(0, [tokens])).transpose();

        let given = match routed.given {
            Some(given) => Some(self.weigh(stream, given, &scores.part(0, [tokens, experts])?)?),
            None => None,
        };
        let mut taken = match (&given, routed.wanted) {
            (None, true) => Some((stream.zeros([tokens, topk])?, stream.zeros([tokens, topk])?)),
            _ => None,
        };
        let routing = match &given {
            Some((ids, weights)) => MoeRouting::Given { topk_ids: ids.view(), topk_weights: weights.view() },
            None => MoeRouting::Logits {
                logits: scores.part(0, [tokens, experts])?,
                selection_bias: self.selection_bias.as_ref().map(|bias| bias.view()),
            },
        };
        let input = MoeInput {
            x: x()?,
            routing,
            shared_gate: if self.apart.is_some() { None } else { shared_gate()? },
            gate_up: self.gate_up.view(),
            down: self.down.view(),
        };
        // Where shared experts come apart and scaled, they are added to the routed ones at the end.
        let gated = self.apart.is_some() && self.shared_gate.is_some();
        let out = if gated { c.part_mut(0, shape)? } else { delta.part_mut(0, shape)? };
        let mut buffers = MoeBuffers { out, topk: taken.as_mut().map(topk_buffers) };
        planned(moe.as_ref())?.forward_into(stream, &input, &mut bytes.view_mut(), &mut buffers)?;

        if let Some(apart) = &self.apart {
            apart.run(stream, tokens, normed, a, b)?;
            let shared = b.part(0, shape)?;
            if gated {
                let input = CombineInput {
                    y: c.part(0, shape)?,
                    inverse: order.part(0, [tokens, 1])?,
                    topk_weights: ones.part(0, [tokens, 1])?,
                    shared: Some(shared),
                    shared_gate: shared_gate()?,
                };
                combine_into(stream, &input, &mut delta.part_mut(0, shape)?)?;
            } else {
                add_into(stream, &mut delta.part_mut(0, shape)?, &shared)?;
            }
        }
        if routed.wanted {
            let ids = match (routed.given, taken) {
                (None, Some((ids, _))) => Some(TopkIds { ids: stream.download(&ids.view())?, topk }),
                (given, _) => given.cloned(),
            };
            let logits = stream.download(&scores.part(0, [tokens, experts])?)?;
            routed.taken = ids.map(|ids| (ids, logits));
        }
        Ok(())
    }

    /// Ids and weights of a routing made elsewhere, from the router's logits. It waits: this is for comparing.
    fn weigh(&self, stream: &Stream, given: &TopkIds, logits: &View<'_, f32>) -> Result<(Tensor<i32>, Tensor<f32>)> {
        let weights = topk_weights(&self.routing, &stream.download(logits)?, &given.ids)?;
        let shape = [given.ids.len() / given.topk.max(1), given.topk];
        Ok((stream.upload(shape, &given.ids)?, stream.upload(shape, &weights)?))
    }
}

fn planned(moe: Option<&MoeLayer>) -> Result<&MoeLayer> {
    moe.ok_or_else(|| Error::Input("a pass over no tokens has no plan".to_owned()))
}

fn topk_buffers((ids, weights): &mut (Tensor<i32>, Tensor<f32>)) -> TopkBuffers<'_> {
    TopkBuffers { ids: ids.view_mut(), weights: weights.view_mut() }
}

fn gate_product(stream: &Stream, x: View<'_, bf16>, gate: &Tensor<bf16>, logits: &mut ViewMut<'_, f32>) -> Result<()> {
    Ok(router_logits_into(stream, &RouterLogitsInput { x, gate: gate.view(), bias: None }, logits)?)
}
