//! What one pass of a model works on.

/// A run of tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The sequence's slot in the cache.
    pub sequence: usize,
    /// Position of the first token in its sequence.
    pub position: usize,
    /// Number of tokens.
    pub len: usize,
}

/// Tokens of several sequences, one segment after another, without padding.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// The ids of all segments; their lengths sum to its length.
    pub ids: &'a [u32],
    /// Whose they are; a sequence has at most one segment.
    pub segments: &'a [Segment],
}
