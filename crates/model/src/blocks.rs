//! Blocks of a cache of keys and values: who holds them, what is known of them, and how far they are written.
//!
//! A cache is blocks of [`BLOCK_SIZE`] tokens, and a sequence a table of blocks (`PagedAttention`, arXiv 2309.06180), so that sequences of any
//! lengths share the memory without moving. Backends keep the blocks' contents and know nothing of sequences; whose a block is stands
//! here, on the host, the same for every backend.

use std::collections::{BTreeMap, HashMap};

use crate::{Error, Result, Segment};

/// Tokens of a block. Attention on a GPU takes tiles of as many keys.
pub const BLOCK_SIZE: usize = 64;

/// Blocks that hold this many tokens.
pub const fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

/// The blocks of one sequence, in the order of its positions.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) blocks: Vec<u32>,
    /// How many of them, from the first on, the pool knows the tokens of, and the name of the last of these.
    known: usize,
    name: Name,
}

impl Table {
    /// Tokens of blocks that were taken because they hold them already.
    pub(crate) fn known_tokens(&self) -> usize {
        self.known * BLOCK_SIZE
    }
}

/// Stands for the tokens of a block and all before it. No other tokens ever have the same; 0 is no tokens.
type Name = u64;

/// What a block holds: its tokens, and the name of those before it.
type Contents = (Name, Box<[u32]>);

/// Blocks that tables take and give back. A full block that was given back keeps what it holds until it is needed for something else,
/// and serves whoever begins with the same tokens.
#[derive(Debug)]
pub(crate) struct Pool {
    blocks: Vec<Block>,
    /// Blocks that hold nothing of use, the next one last.
    free: Vec<u32>,
    /// Blocks that hold known tokens and that no table holds, by when they were given back.
    idle: BTreeMap<u64, u32>,
    known: HashMap<Contents, u32>,
    names: Name,
    clock: u64,
}

#[derive(Debug, Clone, Default)]
struct Block {
    /// Tables that hold it.
    holders: usize,
    /// When the last one gave it back.
    idle_since: u64,
    known: Option<(Contents, Name)>,
}

impl Pool {
    pub(crate) fn new(blocks: usize) -> Self {
        Self {
            blocks: vec![Block::default(); blocks],
            free: (0..blocks as u32).rev().collect(),
            idle: BTreeMap::new(),
            known: HashMap::new(),
            names: 0,
            clock: 0,
        }
    }

    /// Blocks that no table holds.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// A table for these tokens with the known blocks that they begin with. It leaves at least one token to be computed.
    pub(crate) fn begin(&mut self, ids: &[u32]) -> Table {
        let mut table = Table::default();
        let full = ids.len().saturating_sub(1) / BLOCK_SIZE;
        for tokens in ids.chunks_exact(BLOCK_SIZE).take(full) {
            let Some(&number) = self.known.get(&(table.name, tokens.into())) else { break };
            let block = &mut self.blocks[number as usize];
            if block.holders == 0 {
                self.idle.remove(&block.idle_since);
            }
            block.holders += 1;
            table.name = block.known.as_ref().map_or(0, |(_, name)| *name);
            table.blocks.push(number);
            table.known += 1;
        }
        table
    }

    /// Makes a table long enough for `tokens` tokens, as far as there are blocks, and says whether there were enough.
    pub(crate) fn grow(&mut self, table: &mut Table, tokens: usize) -> bool {
        while table.blocks.len() < blocks_for(tokens) {
            let Some(number) = self.free.pop().or_else(|| self.idle.pop_first().map(|(_, number)| number)) else {
                return false;
            };
            let block = &mut self.blocks[number as usize];
            if let Some((contents, _)) = block.known.take() {
                self.known.remove(&contents);
            }
            block.holders = 1;
            table.blocks.push(number);
        }
        true
    }

    /// Notes the blocks of a table that `ids`, which are computed, fill.
    pub(crate) fn learn(&mut self, table: &mut Table, ids: &[u32]) {
        for tokens in ids.chunks_exact(BLOCK_SIZE).skip(table.known) {
            let contents = (table.name, Box::from(tokens));
            table.name = if let Some(same) = self.known.get(&contents) {
                // Computed twice, side by side: one of them is enough to know.
                self.blocks[*same as usize].known.as_ref().map_or(0, |(_, name)| *name)
            } else {
                self.names += 1;
                let number = table.blocks[table.known];
                self.blocks[number as usize].known = Some((contents.clone(), self.names));
                self.known.insert(contents, number);
                self.names
            };
            table.known += 1;
        }
    }

    /// Takes a table's blocks back, so that the next to take some gets them in the same order.
    pub(crate) fn release(&mut self, table: Table) {
        for number in table.blocks.into_iter().rev() {
            let block = &mut self.blocks[number as usize];
            block.holders -= 1;
            if block.holders > 0 {
                continue;
            }
            if block.known.is_some() {
                self.clock += 1;
                block.idle_since = self.clock;
                self.idle.insert(self.clock, number);
            } else {
                self.free.push(number);
            }
        }
    }
}

/// How many rows of each block of a cache are written: what keeps a pass from reading what nobody wrote.
#[derive(Debug)]
pub(crate) struct Written(Vec<u8>);

impl Written {
    pub(crate) fn new(blocks: usize) -> Self {
        Self(vec![0; blocks])
    }

    /// Checks that segments fit their tables, continue what is written and write apart from each other, and notes what they write.
    pub(crate) fn note(&mut self, segments: &[Segment<'_>]) -> Result<()> {
        let mut targets = Vec::with_capacity(segments.len());
        for (index, segment) in segments.iter().enumerate() {
            self.check(index, segment)?;
            targets.extend(segment.targets().map(|(block, _)| block));
        }
        targets.sort_unstable();
        let twice = targets.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).next();
        if let Some(block) = twice {
            return Err(Error::Input(format!("two segments of one pass write to block {block} of the cache")));
        }
        for (block, end) in segments.iter().flat_map(Segment::targets) {
            self.0[block as usize] = end as u8;
        }
        Ok(())
    }

    fn check(&self, index: usize, segment: &Segment<'_>) -> Result<()> {
        let Segment { blocks, position, len } = *segment;
        let end = position.saturating_add(len);
        let refuse = |problem: String| Err(Error::Input(format!("segment {index}: {problem}")));
        if blocks_for(end) > blocks.len() {
            let held = blocks.len() * BLOCK_SIZE;
            return refuse(format!("tokens {position} to {end} do not fit in a table of {held}"));
        }
        if let Some(wrong) = blocks[..blocks_for(end)].iter().find(|block| **block as usize >= self.0.len()) {
            return refuse(format!("block {wrong} is not one of the cache's {}", self.0.len()));
        }
        // A sequence is written in order: where its last block is, all before it are.
        let last = position.checked_sub(1).map(|last| (blocks[last / BLOCK_SIZE], last % BLOCK_SIZE));
        match last.filter(|(block, row)| usize::from(self.0[*block as usize]) <= *row) {
            Some(_) => refuse(format!("tokens {position} to {end} do not continue what its blocks hold")),
            None => Ok(()),
        }
    }
}

impl Segment<'_> {
    /// The blocks that it writes to, each with the row where it ends there.
    fn targets(&self) -> impl Iterator<Item = (u32, usize)> {
        let end = self.position + self.len;
        let touched = if self.len == 0 { 0..0 } else { self.position / BLOCK_SIZE..blocks_for(end) };
        touched.map(move |at| (self.blocks[at], (end - at * BLOCK_SIZE).min(BLOCK_SIZE)))
    }

    /// The cache's row of each of its tokens.
    pub(crate) fn rows(&self) -> impl Iterator<Item = usize> {
        (self.position..self.position + self.len)
            .map(|position| self.blocks[position / BLOCK_SIZE] as usize * BLOCK_SIZE + position % BLOCK_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(count: usize, seed: u32) -> Vec<u32> {
        (0..count as u32).map(|at| at * 7 + seed).collect()
    }

    /// A table of these tokens, computed.
    fn computed(pool: &mut Pool, ids: &[u32]) -> Table {
        let mut table = pool.begin(ids);
        assert!(pool.grow(&mut table, ids.len()));
        pool.learn(&mut table, ids);
        table
    }

    #[test]
    fn blocks_come_in_order_and_come_back() {
        let mut pool = Pool::new(4);
        let mut first = Table::default();
        assert!(pool.grow(&mut first, 65));
        let mut second = Table::default();
        assert!(!pool.grow(&mut second, 3 * 64));
        assert_eq!((first.blocks.as_slice(), second.blocks.as_slice()), (&[0, 1][..], &[2, 3][..]));
        pool.release(first);
        assert!(pool.grow(&mut second, 4 * 64));
        assert_eq!((second.blocks.as_slice(), pool.available()), (&[2, 3, 0, 1][..], 0));
        pool.release(second);
        assert_eq!(pool.available(), 4);
    }

    #[test]
    fn whoever_begins_alike_shares_full_blocks() {
        let mut pool = Pool::new(8);
        let prompt = ids(150, 1);
        let first = computed(&mut pool, &prompt);
        let second = computed(&mut pool, &prompt);
        assert_eq!(first.blocks[..2], second.blocks[..2]);
        assert_ne!(first.blocks[2], second.blocks[2]);
        assert_eq!((second.known_tokens(), pool.available()), (128, 4));
        // The second block of tokens alike, after a first one that is not.
        let other = [ids(64, 9), prompt[64..].to_vec()].concat();
        assert_eq!(pool.begin(&other).known_tokens(), 0);
        // Of whole blocks the last is left to be computed.
        let whole = pool.begin(&prompt[..128]);
        assert_eq!(whole.known_tokens(), 64);
        for table in [first, second, whole] {
            pool.release(table);
        }
        assert_eq!(pool.available(), 8);
        assert_eq!(pool.begin(&prompt).known_tokens(), 128, "they are kept");
    }

    #[test]
    fn known_blocks_are_forgotten_when_they_are_needed() {
        let mut pool = Pool::new(4);
        let (old, new) = (ids(129, 1), ids(129, 2));
        let table = computed(&mut pool, &old);
        pool.release(table);
        // Takes the two that hold nothing of use, then the last block of what was given back.
        let table = computed(&mut pool, &new);
        pool.release(table);
        let table = pool.begin(&old);
        assert_eq!(table.known_tokens(), 64);
        pool.release(table);
        let mut all = Table::default();
        assert!(pool.grow(&mut all, 4 * 64));
        pool.release(all);
        assert_eq!((pool.begin(&old).known_tokens(), pool.begin(&new).known_tokens()), (0, 0));
        assert!(pool.known.is_empty() && pool.idle.is_empty());
    }

    #[test]
    fn twins_that_grow_side_by_side_stay_two() {
        let mut pool = Pool::new(4);
        let prompt = ids(128, 3);
        let mut twins = [Table::default(), Table::default()];
        for table in &mut twins {
            assert!(pool.grow(table, 128));
        }
        twins.iter_mut().for_each(|table| pool.learn(table, &prompt));
        assert_eq!(twins[0].name, twins[1].name);
        let [first, second] = twins;
        pool.release(first);
        pool.release(second);
        assert_eq!((pool.available(), pool.free.len()), (4, 2));
    }

    #[test]
    fn segments_that_read_or_write_what_they_must_not() {
        let mut written = Written::new(4);
        let segment = |blocks, position, len| Segment { blocks, position, len };
        written.note(&[segment(&[2, 0], 0, 70), segment(&[1], 0, 3)]).unwrap();
        for (segments, problem) in [
            (vec![segment(&[2], 0, 65)], "segment 0: tokens 0 to 65 do not fit in a table of 64"),
            (vec![segment(&[4], 0, 1)], "segment 0: block 4 is not one of the cache's 4"),
            (vec![segment(&[2, 0], 71, 1)], "segment 0: tokens 71 to 72 do not continue what its blocks hold"),
            (vec![segment(&[1], 0, 1), segment(&[3], 1, 1)], "segment 1: tokens 1 to 2 do not continue"),
            (vec![segment(&[1], 3, 1), segment(&[1], 0, 1)], "two segments of one pass write to block 1"),
        ] {
            let text = written.note(&segments).unwrap_err().to_string();
            assert!(text.starts_with(problem), "{text}");
        }
        // Reading one block twice is no harm, nor is going back.
        written.note(&[segment(&[2, 0], 70, 1), segment(&[2, 3], 64, 1), segment(&[1], 1, 1)]).unwrap();
        written.note(&[segment(&[2, 0], 71, 1), segment(&[1], 2, 0)]).unwrap();
    }
}
