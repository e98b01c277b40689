//! Permutation: tokens in the order of their experts, and back.

use crate::{Error, Result, error::check_len};

use super::Real;

/// Where every (token, slot) pair goes when pairs are sorted by expert: stable, so ascending token within an expert.
/// It belongs to the routing it was made from and carries its shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Permutation {
    num_tokens: usize,
    topk: usize,
    expert_offsets: Vec<usize>,
    slots: Vec<usize>,
    inverse: Vec<Option<usize>>,
}

impl Permutation {
    /// Sorts `topk_ids` `[T, K]` by expert; ids of -1 (unused or dropped) go nowhere.
    ///
    /// # Errors
    /// [`Error::Shape`] if the ids are not rows of `topk`, [`Error::Index`] if an id is below -1 or not below `num_experts`.
    pub fn new(topk_ids: &[i32], topk: usize, num_experts: usize) -> Result<Self> {
        let num_tokens = topk_ids.len().checked_div(topk).unwrap_or(0);
        check_len("permute", "topk_ids", topk_ids.len(), num_tokens * topk)?;
        let mut expert_offsets = vec![0; num_experts + 1];
        for id in topk_ids {
            match usize::try_from(*id) {
                Ok(expert) if expert < num_experts => expert_offsets[expert + 1] += 1,
                Err(_) if *id == -1 => {}
                _ => {
                    let got = i64::from(*id);
                    return Err(Error::Index { operation: "permute", argument: "topk_ids", limit: num_experts, got });
                }
            }
        }
        for expert in 0..num_experts {
            expert_offsets[expert + 1] += expert_offsets[expert];
        }
        let mut next = expert_offsets.clone();
        let mut slots = vec![0; expert_offsets[num_experts]];
        let mut inverse = vec![None; topk_ids.len()];
        for (slot, id) in topk_ids.iter().enumerate() {
            if let Ok(expert) = usize::try_from(*id) {
                let row = next[expert];
                next[expert] += 1;
                slots[row] = slot;
                inverse[slot] = Some(row);
            }
        }
        Ok(Self { num_tokens, topk, expert_offsets, slots, inverse })
    }

    /// T.
    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    /// K.
    pub fn topk(&self) -> usize {
        self.topk
    }

    /// `[E + 1]`: expert `e` has the permuted rows `offsets[e]..offsets[e + 1]`.
    pub fn expert_offsets(&self) -> &[usize] {
        &self.expert_offsets
    }

    /// For each permuted row, the pair `token * K + slot` it came from.
    pub fn slots(&self) -> &[usize] {
        &self.slots
    }

    /// For each pair `token * K + slot`, its permuted row, or `None` if it was dropped.
    pub fn inverse(&self) -> &[Option<usize>] {
        &self.inverse
    }

    /// Rows of `x` `[T, d]` in permuted order: `[rows, d]`, a token once for every slot it uses.
    ///
    /// # Errors
    /// [`Error::Shape`] if `x` is not `T` rows of `d`.
    pub fn permute<T: Real>(&self, x: &[T], hidden_size: usize) -> Result<Vec<T>> {
        check_len("permute", "x", x.len(), self.num_tokens * hidden_size)?;
        let mut rows = Vec::with_capacity(self.slots.len() * hidden_size);
        for slot in &self.slots {
            rows.extend_from_slice(&x[slot / self.topk * hidden_size..][..hidden_size]);
        }
        Ok(rows)
    }

    /// The inverse: permuted rows `[rows, d]` back to `[T, K, d]`, zeros where a slot was dropped.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many rows as slots in use.
    pub fn unpermute<T: Real>(&self, rows: &[T], hidden_size: usize) -> Result<Vec<T>> {
        check_len("unpermute", "rows", rows.len(), self.slots.len() * hidden_size)?;
        let mut out = vec![T::ZERO; self.inverse.len() * hidden_size];
        if hidden_size > 0 {
            for (out, row) in out.chunks_exact_mut(hidden_size).zip(&self.inverse) {
                if let Some(row) = row {
                    out.copy_from_slice(&rows[row * hidden_size..][..hidden_size]);
                }
            }
        }
        Ok(out)
    }
}
