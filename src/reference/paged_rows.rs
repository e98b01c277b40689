//! Rows of one sequence in a cache of blocks.

use std::borrow::Cow;

use crate::{Error, Result, error::check_len};

/// The first `length` rows of a sequence whose position `s` lies in block `table[s / block_size]`, row `s % block_size` (`PagedAttention`,
/// arXiv 2309.06180). Attention over a cache of blocks is [`attention`](super::attention()) over these rows.
///
/// `cache` is `[blocks, block_size, stride]`. Rows that follow each other already are borrowed, others copied.
///
/// # Errors
/// [`Error::Shape`] if the cache is not whole blocks or the table too short, [`Error::Index`] if it names a block that does not exist.
pub fn paged_rows<'a, T: Clone>(
    cache: &'a [T],
    [block_size, stride]: [usize; 2],
    table: &[u32],
    length: usize,
) -> Result<Cow<'a, [T]>> {
    const OPERATION: &str = "paged_rows";
    let size = block_size * stride;
    let blocks = cache.len().checked_div(size).unwrap_or(0);
    check_len(OPERATION, "cache", cache.len(), blocks * size)?;
    if length > table.len() * block_size {
        let (expected, got) = (format!("enough for {length} rows"), format!("{} blocks of {block_size}", table.len()));
        return Err(Error::Shape { operation: OPERATION, argument: "table", expected, got });
    }
    let table = &table[..length.div_ceil(block_size.max(1))];
    if let Some(&wrong) = table.iter().find(|block| **block as usize >= blocks) {
        return Err(Error::Index { operation: OPERATION, argument: "table", limit: blocks, got: wrong.into() });
    }
    let (Some(&first), true) = (table.first(), size > 0) else { return Ok(Cow::Borrowed(&[])) };
    if table.windows(2).all(|pair| pair[0] + 1 == pair[1]) {
        return Ok(Cow::Borrowed(&cache[first as usize * size..][..length * stride]));
    }
    let mut rows = Vec::with_capacity(table.len() * size);
    for &block in table {
        rows.extend_from_slice(&cache[block as usize * size..][..size]);
    }
    rows.truncate(length * stride);
    Ok(Cow::Owned(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_the_order_of_the_table() {
        let cache: Vec<f32> = (0..24).map(|row| row as f32).collect();
        // Four blocks of three rows of two.
        let rows = |table: &[u32], length| paged_rows(&cache, [3, 2], table, length);
        assert!(matches!(rows(&[1, 2], 5).unwrap(), Cow::Borrowed(found) if *found == cache[6..16]));
        assert_eq!(*rows(&[3, 0], 4).unwrap(), [18., 19., 20., 21., 22., 23., 0., 1.]);
        // What the table holds past the rows is not looked at.
        assert_eq!(*rows(&[3, 0, 9], 6).unwrap(), [&cache[18..24], &cache[..6]].concat());
        assert!(rows(&[], 0).unwrap().is_empty());
        assert!(paged_rows::<f32>(&[], [3, 0], &[0], 2).is_err() && rows(&[], 1).is_err());
        assert_eq!(rows(&[0, 4], 4).unwrap_err().to_string(), "paged_rows: table holds 4, but must be below 4");
        assert!(paged_rows(&cache[1..], [3, 2], &[0], 1).is_err());
    }
}
