//! How the tokens of a pass are drawn on the GPU. Settings and random numbers lie at one address, from where recorded steps read them.

use anabranch::cuda::{SampleRow, View};

use super::{
    graphs::MOST_SEQUENCES,
    memory::{Buffer, Gpu, Purpose},
};
use crate::{Draw, Result};

/// The draws of a pass, a row of logits each.
#[derive(Debug)]
pub(super) struct Draws(Buffer<SampleRow>);

impl Draws {
    /// Room for every step that is recorded.
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        Ok(Self(gpu.zeros(Purpose::Workspace, [MOST_SEQUENCES])?))
    }

    /// Brings a pass's draws to the GPU, where any is of use there.
    pub(super) fn set(&mut self, gpu: &Gpu, draws: &[Draw<'_>]) -> Result<()> {
        if !any_drawn(draws) {
            return Ok(());
        }
        let row = |draw: &Draw<'_>| {
            if wants_logits(draw) { Ok(SampleRow::greedy()) } else { SampleRow::new(&draw.sampling, draw.u) }
        };
        let rows = draws.iter().map(row).collect::<anabranch::Result<Vec<_>>>()?;
        gpu.reserve(&mut self.0, rows.len())?;
        Ok(gpu.stream.upload_into(&rows, &mut self.0.part_mut(0, [rows.len()])?)?)
    }

    pub(super) fn rows(&self, count: usize) -> Result<View<'_, SampleRow>> {
        Ok(self.0.part(0, [count])?)
    }
}

/// Whether it is left to the host: a repetition penalty is of all tokens so far, which are there.
pub(super) fn wants_logits(draw: &Draw<'_>) -> bool {
    draw.sampling.repetition_penalty() != 1.0
}

/// Whether any token is drawn on the GPU otherwise than as the most probable one.
pub(super) fn any_drawn(draws: &[Draw<'_>]) -> bool {
    draws.iter().any(|draw| !wants_logits(draw) && !draw.sampling.is_greedy())
}
