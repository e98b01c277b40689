//! Keys and values on the CPU.

use anabranch::reference::RopeTable;

use super::CpuTensor;
use crate::{Config, Error, Result, Segment};

/// A cache of float32 rows for every layer and sequence, which grows with the sequence up to its slot's capacity, and the pass under
/// way.
#[derive(Debug)]
pub struct CpuCache {
    pub(super) slots: Slots,
    pub(super) pass: Pass,
}

/// What one pass works with.
#[derive(Debug)]
pub(super) struct Pass {
    pub(super) segments: Vec<Segment>,
    /// cos and sin of every token's position.
    pub(super) rope: RopeTable,
    /// The residual stream.
    pub(super) x: CpuTensor,
}

/// Keys and values.
#[derive(Debug)]
pub(super) struct Slots {
    capacities: Vec<usize>,
    /// `[layer][sequence]`.
    layers: Vec<Vec<Slot>>,
}

/// One sequence in one layer: two sides of rows. Latent attention keeps its one row a token in `keys`.
#[derive(Debug, Clone, Default)]
pub(super) struct Slot {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
}

impl CpuCache {
    pub(super) fn new(config: &Config, capacities: &[usize]) -> Self {
        let layers = vec![vec![Slot::default(); capacities.len()]; config.layers.len()];
        let x = CpuTensor { values: Vec::new(), width: config.hidden_size };
        Self { slots: Slots { capacities: capacities.to_vec(), layers }, pass: Pass::new(config, &[], x) }
    }
}

impl Pass {
    pub(super) fn new(config: &Config, segments: &[Segment], x: CpuTensor) -> Self {
        let positions = segments.iter().flat_map(|segment| segment.position..segment.position + segment.len);
        Self { segments: segments.to_vec(), rope: RopeTable::new(&config.rope, positions), x }
    }
}

impl Slots {
    /// The segment's slot, cut back to where the segment begins. Keys are `key_width` wide.
    pub(super) fn slot(&mut self, layer: usize, segment: &Segment, key_width: usize) -> Result<&mut Slot> {
        let Segment { sequence, position, len } = *segment;
        let slots = self.capacities.len();
        let (Some(slot), Some(capacity)) = (self.layers[layer].get_mut(sequence), self.capacities.get(sequence)) else {
            return Err(Error::Input(format!("sequence {sequence} has no slot in a cache of {slots}")));
        };
        let held = slot.keys.len() / key_width;
        if position > held || position + len > *capacity {
            return Err(Error::Input(format!(
                "tokens {position} to {} of sequence {sequence} do not continue the {held} that its slot of {capacity} holds",
                position + len
            )));
        }
        let value_width = slot.values.len().checked_div(held).unwrap_or(0);
        slot.keys.truncate(position * key_width);
        slot.values.truncate(position * value_width);
        Ok(slot)
    }
}
