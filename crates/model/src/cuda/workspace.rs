//! The buffers of a pass: asked for by size when a batch is larger than any before, and the same from then on.

use anabranch::cuda::{GemmOutput, MoeLayer, Stream, View, ViewMut, add_into};
use half::bf16;

use super::{
    attention::{self, Expanded},
    draws::Draws,
    layers::{Dense, Norm},
    load::pad,
    memory::{Buffer, Gpu, Purpose, explain},
    moe::{self, Experts},
};
use crate::{Config, Result};

/// Activations of a pass. A row a token; those past the batch's tokens are an earlier batch's.
#[derive(Debug)]
pub(super) struct Workspace {
    /// Tokens that everything has room for.
    capacity: usize,
    widths: Widths,
    experts: Option<Experts>,
    pub(super) residual: Residual,
    /// What a step reads.
    pub(super) normed: Buffer<bf16>,
    /// Three for the use within a step; b and c are of one size where latent attention swaps them.
    pub(super) a: Buffer<bf16>,
    pub(super) b: Buffer<bf16>,
    pub(super) c: Buffer<bf16>,
    /// Heads that are made out of latents. Their room goes by contexts, not by tokens.
    pub(super) expanded: Expanded,
    /// The router's logits, `[T, E]`, and those of the shared experts' gate, `[T]`.
    pub(super) scores: Buffer<f32>,
    pub(super) gates: Buffer<f32>,
    /// `[T]` of 0, 1, 2, ... and of ones: each token's row, with weight one.
    pub(super) order: Buffer<i32>,
    pub(super) ones: Buffer<f32>,
    /// What operations ask for.
    pub(super) bytes: Buffer<u8>,
    /// The routed experts' plan for as many tokens as there is room for.
    pub(super) moe: Option<MoeLayer>,
    /// Rows of `normed` that logits are wanted of, these rows, their logits, how tokens are drawn from them, and the tokens.
    pub(super) rows: Buffer<u32>,
    pub(super) picked: Buffer<bf16>,
    pub(super) logits: Buffer<f32>,
    pub(super) draws: Draws,
    pub(super) tokens: Buffer<i32>,
}

/// Elements a token.
#[derive(Debug, Clone, Copy)]
struct Widths {
    hidden: usize,
    scratch: [usize; 3],
    num_experts: usize,
}

impl Widths {
    fn of(config: &Config) -> Result<Self> {
        let hidden = pad(config.hidden_size);
        let [mut a, mut b, mut c] = attention::widths(config)?;
        a = a.max(pad(config.intermediate_size));
        let mut num_experts = 0;
        if let Some(moe) = &config.moe {
            num_experts = moe.routing.num_experts();
            // Shared experts by themselves: h, their output, and the routed experts' beside it.
            if let Some(shared) = moe.shared {
                a = a.max(pad(shared.intermediate_size));
                b = b.max(hidden);
                c = c.max(hidden);
            }
        }
        Ok(Self { hidden, scratch: [a, b, c], num_experts })
    }

    /// Bytes a token, but for what operations ask for.
    fn bytes(&self) -> usize {
        2 * (5 * self.hidden + self.scratch.iter().sum::<usize>()) + 4 * (self.num_experts + 3)
    }
}

impl Workspace {
    /// Nothing yet.
    pub(super) fn new(gpu: &Gpu, config: &Config) -> Result<Self> {
        fn none<T: anabranch::cuda::Element>(gpu: &Gpu) -> Result<Buffer<T>> {
            gpu.zeros(Purpose::Workspace, [0])
        }
        Ok(Self {
            capacity: 0,
            widths: Widths::of(config)?,
            experts: moe::experts(config),
            residual: Residual {
                x: none(gpu)?,
                next_x: none(gpu)?,
                delta: none(gpu)?,
                next_delta: none(gpu)?,
                pending: false,
            },
            normed: none(gpu)?,
            a: none(gpu)?,
            b: none(gpu)?,
            c: none(gpu)?,
            expanded: Expanded::new(gpu)?,
            scores: none(gpu)?,
            gates: none(gpu)?,
            order: none(gpu)?,
            ones: none(gpu)?,
            bytes: none(gpu)?,
            moe: None,
            rows: none(gpu)?,
            picked: none(gpu)?,
            logits: none(gpu)?,
            draws: Draws::new(gpu)?,
            tokens: none(gpu)?,
        })
    }

    /// Makes room for a batch. What the buffers held is lost if they grow.
    pub(super) fn reserve(&mut self, gpu: &Gpu, tokens: usize) -> Result<()> {
        if tokens <= self.capacity {
            return Ok(());
        }
        // A growth that fails half way leaves buffers of different sizes, which the next one makes equal again.
        self.capacity = 0;
        let each = self.widths.bytes() as u64;
        self.grow(gpu, tokens).map_err(|error| {
            explain(
                error,
                || format!("a buffer of a pass over {tokens} tokens"),
                |free| format!("about {} tokens at a time would fit", free / each),
            )
        })?;
        self.capacity = tokens;
        Ok(())
    }

    fn grow(&mut self, gpu: &Gpu, tokens: usize) -> Result<()> {
        let Widths { hidden, scratch: [a, b, c], num_experts } = self.widths;
        let wide = [
            (&mut self.residual.x, hidden),
            (&mut self.residual.next_x, hidden),
            (&mut self.residual.delta, hidden),
            (&mut self.residual.next_delta, hidden),
            (&mut self.normed, hidden),
            (&mut self.a, a),
            (&mut self.b, b),
            (&mut self.c, c),
        ];
        for (buffer, width) in wide {
            gpu.reserve(buffer, tokens * width)?;
        }
        gpu.reserve(&mut self.scores, tokens * num_experts)?;
        let Some(experts) = self.experts else { return Ok(()) };
        let plan = experts.plan(gpu, tokens)?;
        gpu.reserve(&mut self.bytes, plan.workspace_bytes())?;
        self.moe = Some(plan);
        if experts.gated {
            gpu.reserve(&mut self.gates, tokens)?;
        }
        if experts.apart {
            self.order = gpu.upload(Purpose::Workspace, [tokens], &(0..tokens as i32).collect::<Vec<_>>())?;
            self.ones = gpu.upload(Purpose::Workspace, [tokens], &vec![1.0; tokens])?;
        }
        Ok(())
    }

    /// `norm(x)` to `normed`, where x is the residual stream with what was still to be added.
    pub(super) fn norm(&mut self, gpu: &Gpu, norm: &Norm, tokens: usize) -> Result<()> {
        let shape = [tokens, self.widths.hidden];
        self.residual.norm(&gpu.stream, norm, shape, &mut self.normed.part_mut(0, shape)?)
    }

    /// The residual stream, with what was still to be added.
    pub(super) fn residual(&mut self, gpu: &Gpu, tokens: usize) -> Result<View<'_, bf16>> {
        self.residual.whole(&gpu.stream, [tokens, self.widths.hidden])
    }
}

/// The residual stream, and what steps add to it. A step that reads one of the buffers and writes its successor writes to
/// the other of the kind; then they change names.
#[derive(Debug)]
pub(super) struct Residual {
    /// Without `delta` while that is pending.
    pub(super) x: Buffer<bf16>,
    next_x: Buffer<bf16>,
    /// What the last step adds.
    pub(super) delta: Buffer<bf16>,
    pub(super) next_delta: Buffer<bf16>,
    /// Whether `delta` is still to be added, which the next norm does on its way.
    pub(super) pending: bool,
}

impl Residual {
    /// The stream, for who writes all of it.
    pub(super) fn begin(&mut self) -> &mut Buffer<bf16> {
        self.pending = false;
        &mut self.x
    }

    /// `delta` is complete.
    pub(super) fn added(&mut self) {
        self.pending = true;
    }

    fn norm(&mut self, stream: &Stream, norm: &Norm, shape: [usize; 2], out: &mut ViewMut<'_, bf16>) -> Result<()> {
        if self.pending {
            norm.add_and_run(stream, &mut self.x.part_mut(0, shape)?, &self.delta.part(0, shape)?, out)?;
        } else {
            norm.run(stream, &self.x.part(0, shape)?, out)?;
        }
        self.pending = false;
        Ok(())
    }

    /// `dense(norm(x))`, in one launch where there is one for so few tokens, else by way of `normed`.
    pub(super) fn norm_product<O: GemmOutput>(
        &mut self,
        stream: &Stream,
        norm: &Norm,
        dense: &Dense,
        normed: &mut Buffer<bf16>,
        tokens: usize,
        out: &mut ViewMut<'_, O>,
    ) -> Result<()> {
        let shape = [tokens, dense.inner()];
        if !dense.takes_norm(stream, tokens)? {
            self.norm(stream, norm, shape, &mut normed.part_mut(0, shape)?)?;
            return dense.run(stream, normed.part(0, shape)?, out);
        }
        let x = self.x.part(0, shape)?;
        if !self.pending {
            return dense.run_normed(stream, norm, x, None, out);
        }
        let addition = (self.delta.part(0, shape)?, &mut self.next_x.part_mut(0, shape)?);
        dense.run_normed(stream, norm, x, Some(addition), out)?;
        std::mem::swap(&mut self.x, &mut self.next_x);
        self.pending = false;
        Ok(())
    }

    /// The stream with nothing left to be added.
    fn whole(&mut self, stream: &Stream, shape: [usize; 2]) -> Result<View<'_, bf16>> {
        if self.pending {
            add_into(stream, &mut self.x.part_mut(0, shape)?, &self.delta.part(0, shape)?)?;
            self.pending = false;
        }
        Ok(self.x.part(0, shape)?)
    }
}
