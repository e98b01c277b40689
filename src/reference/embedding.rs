//! Embedding: one row of a table per token.

use super::{Matrix, Real};
use crate::{Error, Result};

/// Rows of `table` `[vocab, d]`: `[T, d]`.
///
/// # Errors
/// [`Error::Index`] if an id is not below the vocabulary's size.
pub fn embedding<T: Real>(table: &Matrix<'_>, ids: &[u32]) -> Result<Vec<T>> {
    let (vocab, width) = (table.rows(), table.columns());
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
        return Err(Error::Index { operation: "embedding", argument: "ids", limit: vocab, got: i64::from(*id) });
    }
    let mut out = vec![T::ZERO; ids.len() * width];
    if width > 0 {
        for (out, id) in out.chunks_exact_mut(width).zip(ids) {
            table.read_row(*id as usize, out);
        }
    }
    Ok(out)
}
