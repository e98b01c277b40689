//! What every part of a model is made of: norms and dense products.

use std::ops::Range;

use anabranch::cuda::{
    Epilogue, GemmOutput, HeadNorm, HeadRange, LinearInput, NormLinearInput, Stream, Tile, View, ViewMut,
    add_rms_norm_into, linear_into, norm_linear_into, norm_linear_takes, rms_norm_heads_into, rms_norm_into,
};
use half::bf16;

use super::{
    load::Axis,
    memory::{Buffer, Gpu, Purpose},
};
use crate::{Result, weights::StoredLinear};

/// An RMS norm. The zeros of a padded width make the mean square too small by `len / padded`: the norm of that is what it
/// should be after `eps` is scaled alike and the weight by the square root.
#[derive(Debug)]
pub struct Norm {
    weight: Buffer<f32>,
    eps: f32,
}

impl Norm {
    pub(super) fn load(gpu: &Gpu, weight: &[f32], axis: Axis, eps: f32) -> Result<Self> {
        let share = axis.stored() as f32 / axis.len() as f32;
        let mut weight = axis.spread(weight);
        weight.iter_mut().for_each(|value| *value *= share.sqrt());
        Ok(Self { weight: gpu.upload(Purpose::Weights, [weight.len()], &weight)?, eps: eps * share })
    }

    pub(super) fn weight(&self) -> View<'_, f32> {
        self.weight.view()
    }

    pub(super) fn eps(&self) -> f32 {
        self.eps
    }

    pub(super) fn run(&self, stream: &Stream, x: &View<'_, bf16>, out: &mut ViewMut<'_, bf16>) -> Result<()> {
        Ok(rms_norm_into(stream, x, &self.weight.view(), self.eps, out)?)
    }

    /// `x += delta` before.
    pub(super) fn add_and_run(
        &self,
        stream: &Stream,
        x: &mut ViewMut<'_, bf16>,
        delta: &View<'_, bf16>,
        out: &mut ViewMut<'_, bf16>,
    ) -> Result<()> {
        Ok(add_rms_norm_into(stream, x, delta, &self.weight.view(), self.eps, out)?)
    }

    /// Of the first elements of heads, where they are rotated.
    pub(super) fn of_heads(&self) -> HeadNorm<'_> {
        HeadNorm { weight: self.weight.view(), eps: self.eps }
    }

    /// Of heads, in place: as many as the weight's length makes of the range.
    pub(super) fn run_heads(&self, stream: &Stream, x: &mut ViewMut<'_, bf16>, range: HeadRange) -> Result<()> {
        let head_dim = self.weight.shape().len();
        let heads = HeadRange { column: range.column, num_heads: range.width() / head_dim, head_dim };
        Ok(rms_norm_heads_into(stream, x, heads, &self.weight.view(), self.eps)?)
    }
}

/// A dense product, `x W^T + b`: `linear`, which chooses between the kernels' own and cuBLASLt.
#[derive(Debug)]
pub(super) struct Dense {
    weight: Buffer<bf16>,
    bias: Option<Buffer<f32>>,
    epilogue: Epilogue,
}

impl Dense {
    pub(super) fn load(gpu: &Gpu, from: &StoredLinear, rows: Axis, columns: Axis) -> Result<Self> {
        Self::stack(gpu, &[(from, rows)], columns, Epilogue::Linear)
    }

    /// Weights with the same input, one below the other: their products side by side.
    pub(super) fn stack(gpu: &Gpu, parts: &[(&StoredLinear, Axis)], columns: Axis, epilogue: Epilogue) -> Result<Self> {
        let rows: usize = parts.iter().map(|(_, rows)| rows.len()).sum();
        let mut weight = gpu.zeros(Purpose::Weights, [rows, columns.len()])?;
        let mut bias = Vec::with_capacity(rows);
        let mut first = 0;
        for (from, rows) in parts {
            gpu.write(&mut weight, first * columns.len(), from, *rows, columns)?;
            first += rows.len();
            bias.extend(from.bias.as_ref().map_or_else(|| vec![0.0; rows.len()], |bias| rows.spread(bias)));
        }
        let biased = parts.iter().any(|(from, _)| from.bias.is_some());
        let bias = if biased { Some(gpu.upload(Purpose::Weights, [bias.len()], &bias)?) } else { None };
        Ok(Self { weight, bias, epilogue })
    }

    /// Columns of the result.
    pub(super) fn out(&self) -> usize {
        let rows = self.weight.shape().sizes()[0];
        if self.epilogue == Epilogue::SwiGlu { rows / 2 } else { rows }
    }

    /// Columns of what is multiplied.
    pub(super) fn inner(&self) -> usize {
        self.weight.shape().sizes()[1]
    }

    /// The weight itself: an embedding table has no other use for it.
    pub(super) fn weight(&self) -> View<'_, bf16> {
        self.weight.view()
    }

    pub(super) fn run<O: GemmOutput>(
        &self,
        stream: &Stream,
        x: View<'_, bf16>,
        out: &mut ViewMut<'_, O>,
    ) -> Result<()> {
        let bias = self.bias.as_ref().map(|bias| bias.view());
        let input = LinearInput { x, weight: self.weight.view(), bias, epilogue: self.epilogue, tile: Tile::Auto };
        Ok(linear_into(stream, &input, out)?)
    }

    /// Whether [`Dense::run_normed`] takes so many tokens.
    pub(super) fn takes_norm(&self, stream: &Stream, tokens: usize) -> Result<bool> {
        Ok(norm_linear_takes(stream, tokens, [self.inner(), self.out()], self.epilogue, self.bias.is_some())?)
    }

    /// [`Dense::run`] on `norm(x)`, or with an addition on `norm(x + delta)`, whose sum goes to where that says.
    pub(super) fn run_normed<O: GemmOutput>(
        &self,
        stream: &Stream,
        norm: &Norm,
        x: View<'_, bf16>,
        addition: Option<(View<'_, bf16>, &mut ViewMut<'_, bf16>)>,
        out: &mut ViewMut<'_, O>,
    ) -> Result<()> {
        let (delta, sum) = addition.unzip();
        let input = NormLinearInput {
            x,
            delta,
            norm_weight: norm.weight(),
            norm_eps: norm.eps(),
            weight: self.weight.view(),
            bias: self.bias.as_ref().map(|bias| bias.view()),
            epilogue: self.epilogue,
        };
        Ok(norm_linear_into(stream, &input, sum, out)?)
    }

    /// [`Dense::run`] with some of the weight's rows: these columns of the result, which has no others.
    pub(super) fn run_columns<O: GemmOutput>(
        &self,
        stream: &Stream,
        x: View<'_, bf16>,
        columns: Range<usize>,
        out: &mut ViewMut<'_, O>,
    ) -> Result<()> {
        let (count, inner) = (columns.len(), self.inner());
        let weight = self.weight.part(columns.start * inner, [count, inner])?;
        let bias = self.bias.as_ref().map(|bias| bias.part(columns.start, [count])).transpose()?;
        let input = LinearInput { x, weight, bias, epilogue: Epilogue::Linear, tile: Tile::Auto };
        Ok(linear_into(stream, &input, out)?)
    }
}
