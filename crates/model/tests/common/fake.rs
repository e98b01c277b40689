//! A model whose next token is a function of the sequence alone, read through its table from a cache of blocks.

use anabranch_model::{BLOCK_SIZE, Batch, Error, Forward, Result};

pub(crate) const VOCAB_SIZE: usize = 512;

/// Logits are a hash of all ids so far, or a script's next token is certain. A sequence is what its blocks hold, so that a block that
/// two write, or that is given away too early, changes what comes.
#[derive(Debug)]
pub(crate) struct Fake {
    max_position_embeddings: usize,
    script: Vec<u32>,
    /// Ids, `[blocks, BLOCK_SIZE]`.
    cache: Vec<Option<u32>>,
    /// Blocks of the last reset.
    pub(crate) blocks: Option<usize>,
    /// Position and length of every segment.
    pub(crate) passes: Vec<Vec<(usize, usize)>>,
    /// Fails in the pass of this number, once, after it wrote to the cache.
    pub(crate) fail: Option<usize>,
    /// A sequence that holds this token has no logits.
    pub(crate) poison: Option<u32>,
}

impl Fake {
    pub(crate) fn hashing(max_position_embeddings: usize) -> Self {
        Self {
            max_position_embeddings,
            script: vec![],
            cache: vec![],
            blocks: None,
            passes: vec![],
            fail: None,
            poison: None,
        }
    }

    /// After a prompt of one token, says these.
    #[allow(dead_code, reason = "not every test has a script")]
    pub(crate) fn saying(script: Vec<u32>) -> Self {
        Self { script, ..Self::hashing(4096) }
    }

    /// The logits after these ids.
    pub(crate) fn row(&self, ids: &[u32]) -> Vec<f32> {
        if self.poison.is_some_and(|poison| ids.contains(&poison)) {
            return vec![f32::NAN; VOCAB_SIZE];
        }
        if let Some(&next) = self.script.get(ids.len() - 1) {
            return (0..VOCAB_SIZE).map(|id| if id == next as usize { 20.0 } else { 0.0 }).collect();
        }
        let mut hash =
            ids.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, &id| (hash ^ u64::from(id)).wrapping_mul(0x100_0000_01b3));
        let mut next = || {
            hash = hash.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (hash >> 40) as f32 / (1u64 << 24) as f32 * 8.0 - 4.0
        };
        (0..VOCAB_SIZE).map(|_| next()).collect()
    }
}

impl Forward for Fake {
    fn vocab_size(&self) -> usize {
        VOCAB_SIZE
    }

    fn max_position_embeddings(&self) -> usize {
        self.max_position_embeddings
    }

    fn reset(&mut self, blocks: usize) -> Result<()> {
        self.blocks = Some(blocks);
        self.cache = vec![None; blocks * BLOCK_SIZE];
        Ok(())
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<Vec<f32>> {
        let row =
            |blocks: &[u32], position| blocks[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE;
        let mut rest = batch.ids;
        for segment in batch.segments {
            assert!(segment.len > 0);
            let (ids, after) = rest.split_at(segment.len);
            rest = after;
            for (position, id) in (segment.position..).zip(ids) {
                self.cache[row(segment.blocks, position)] = Some(*id);
            }
        }
        assert!(rest.is_empty());
        self.passes.push(batch.segments.iter().map(|segment| (segment.position, segment.len)).collect());
        if self.fail == Some(self.passes.len()) {
            return Err(Error::Input("this pass fails".to_owned()));
        }
        let mut logits = Vec::new();
        for segment in batch.segments {
            let held = |position| self.cache[row(segment.blocks, position)].expect("it was written");
            logits.extend(self.row(&(0..segment.position + segment.len).map(held).collect::<Vec<_>>()));
        }
        Ok(logits)
    }
}
