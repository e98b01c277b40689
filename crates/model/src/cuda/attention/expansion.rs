//! Prompts of latent attention with expanded heads: when that pays, and where the heads lie.
//!
//! A query that attends to latents has heads as wide as a cached row (576 and 512 elements in DeepSeek-V2), four times as many products for
//! each key as with heads of their own (192 and 128). Those must be made out of all latents that a segment sees, which many queries
//! repay and one does not.

use anabranch::cuda::{Epilogue, LinearInput, Stream, Tensor, Tile, View, embedding_into, linear_into};
use half::bf16;

use super::{
    super::memory::{Buffer, Gpu, Purpose},
    LatentSizes,
};
use crate::{
    Error, Result, Segment,
    blocks::{BLOCK_SIZE, blocks_for},
};

/// What a product of attention in latents costs, where one with expanded heads or of the projections costs 1: on an H200 198 TFLOP/s
/// against 553 (docs/performance.md) and about 600. The portable kernel reaches 327 with such heads, which moves the choice by a few queries.
const LATENT_COST: u64 = 3;
/// Bytes of the rows that are expanded at once: 94,000 of 16 heads, and 12,900 of DeepSeek-V3's 128. What is beyond is attended to in
/// latents.
const MOST_BYTES: usize = 1 << 30;

impl LatentSizes {
    /// Whether there are kernels for the expanded heads.
    pub(super) fn can_expand(&self) -> bool {
        self.head <= 192 && self.value <= 128
    }

    /// How many of a pass's segments are attended to in latents: all but the last ones, which are prompts where the batch is an engine's.
    /// The cut is where the pass costs least, as far as memory allows. One cut, and not a choice for each, leaves both kinds tokens
    /// that follow each other.
    pub(in crate::cuda) fn absorbed(&self, segments: &[Segment<'_>]) -> usize {
        let mut best = segments.len();
        if !self.can_expand() {
            return best;
        }
        // Of all before the cut in latents and all after it expanded, against all in latents.
        let (mut saved, mut most_saved, mut blocks) = (0, 0, 0);
        for (index, segment) in segments.iter().enumerate().rev() {
            blocks += blocks_for(segment.position + segment.len);
            if blocks > self.most_blocks() {
                break;
            }
            saved += self.saving(segment.len as u64, (segment.position + segment.len) as u64);
            if saved > most_saved {
                (best, most_saved) = (index, saved);
            }
        }
        best
    }

    /// What `queries`, the last of `keys` tokens, cost less with expanded heads: multiply-adds a head.
    fn saving(&self, queries: u64, keys: u64) -> i64 {
        let [key, latent, head, value] = [self.key(), self.latent, self.head, self.value].map(|size| size as u64);
        // A query sees its own key and those before it.
        let seen = queries * keys - queries * queries.saturating_sub(1) / 2;
        let absorbed = LATENT_COST * seen * (key + latent) + queries * (key * head + latent * value);
        // Whole blocks are expanded.
        let rows = keys.next_multiple_of(BLOCK_SIZE as u64);
        let expanded = seen * (head + value) + rows * key * (head + value);
        absorbed as i64 - expanded as i64
    }

    /// Elements of an expanded row: the cached row, gathered, and the heads that it becomes.
    fn expanded_row(&self) -> usize {
        self.key() + self.heads()
    }

    fn most_blocks(&self) -> usize {
        MOST_BYTES / (2 * self.expanded_row() * BLOCK_SIZE)
    }
}

/// The heads of a pass's expanded segments: rows as their tables have them, one segment after another. Blocks that segments share are there
/// for each of them.
#[derive(Debug)]
pub(in crate::cuda) struct Expanded {
    /// Blocks that there is room for.
    capacity: usize,
    /// `[rows, key]`: cached rows.
    latents: Buffer<bf16>,
    /// `[rows, keys and values of all heads]`.
    heads: Buffer<bf16>,
}

impl Expanded {
    /// Nothing yet.
    pub(in crate::cuda) fn new(gpu: &Gpu) -> Result<Self> {
        let none = || gpu.zeros(Purpose::Workspace, [0]);
        Ok(Self { capacity: 0, latents: none()?, heads: none()? })
    }

    /// Makes room for so many blocks; false where that would be more than half of the memory that is left, which other buffers may still
    /// grow into: latents can be attended to without it. Room doubles, so that a long prompt's pieces seldom ask for more.
    pub(in crate::cuda) fn reserve(&mut self, gpu: &Gpu, sizes: &LatentSizes, blocks: usize) -> Result<bool> {
        if blocks <= self.capacity {
            return Ok(true);
        }
        let capacity = blocks.next_power_of_two().min(sizes.most_blocks());
        let rows = capacity * BLOCK_SIZE;
        if (2 * rows * sizes.expanded_row()) as u64 > gpu.free()? / 2 {
            return Ok(false);
        }
        // Growth that fails leaves nothing that is used.
        self.capacity = 0;
        // Values begin after the first row's keys, and are seen as whole rows from there on.
        let heads = rows * sizes.heads() + sizes.keys();
        match gpu.reserve(&mut self.latents, rows * sizes.key()).and_then(|()| gpu.reserve(&mut self.heads, heads)) {
            Ok(()) => {}
            Err(Error::Operation(anabranch::Error::OutOfMemory { .. })) => return Ok(false),
            Err(error) => return Err(error),
        }
        self.capacity = capacity;
        Ok(true)
    }

    /// Keys and values of all heads, `[rows, at least as wide]` each, of the cached rows of these blocks, one block after another. Blocks
    /// are gathered first, as they lie anywhere and a product's rows do not.
    pub(super) fn expand(
        &mut self,
        stream: &Stream,
        sizes: &LatentSizes,
        cache: &Tensor<bf16>,
        tables: &View<'_, u32>,
        weight: View<'_, bf16>,
    ) -> Result<(View<'_, bf16>, View<'_, bf16>)> {
        let (blocks, block) = (tables.shape().len(), BLOCK_SIZE * sizes.key());
        let cache = cache.part(0, [cache.shape().len() / block, block])?;
        embedding_into(stream, &cache, tables, &mut self.latents.part_mut(0, [blocks, block])?)?;
        let (rows, width) = (blocks * BLOCK_SIZE, sizes.heads());
        let x = self.latents.part(0, [rows, sizes.key()])?;
        let input = LinearInput { x, weight, bias: None, epilogue: Epilogue::Linear, tile: Tile::Auto };
        linear_into(stream, &input, &mut self.heads.part_mut(0, [rows, width])?)?;
        Ok((self.heads.part(0, [rows, width])?, self.heads.part(sizes.keys(), [rows, width])?))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::LatentSizes;
    use crate::{BLOCK_SIZE, Config, Segment};

    fn preset(name: &str) -> LatentSizes {
        LatentSizes::of(&Config::preset(name).unwrap().unwrap().attention).unwrap()
    }

    /// The golden models of this kind are alike.
    fn golden() -> LatentSizes {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/deepseek-v2-lite");
        LatentSizes::of(&Config::from_dir(&folder).unwrap().attention).unwrap()
    }

    /// How many are attended to in latents of segments of these positions and lengths.
    fn absorbed(sizes: &LatentSizes, segments: &[(usize, usize)]) -> usize {
        let segment = |&(position, len): &(usize, usize)| Segment { blocks: &[], position, len };
        sizes.absorbed(&segments.iter().map(segment).collect::<Vec<_>>())
    }

    #[test]
    fn decode_steps_attend_to_latents() {
        for sizes in [preset("deepseek-v2-lite"), preset("deepseek-v3"), golden()] {
            for position in [0, 1, 63, 64, 1000, 32_767, 163_839] {
                assert_eq!(absorbed(&sizes, &[(position, 1)]), 1, "{sizes:?} at {position}");
            }
            assert_eq!(absorbed(&sizes, &[(100, 1); 256]), 256);
        }
        assert_eq!(absorbed(&golden(), &[]), 0);
    }

    #[test]
    fn long_prompts_are_expanded() {
        for sizes in [preset("deepseek-v2-lite"), preset("deepseek-v3")] {
            for (position, len) in [(0, 4096), (0, 512), (0, 64), (512, 512), (8192, 512), (8192, 100)] {
                assert_eq!(absorbed(&sizes, &[(position, len)]), 0, "{sizes:?}: {len} at {position}");
            }
            // What a few queries see would be expanded for them alone.
            for (position, len) in [(0, 16), (8192, 16), (8192, 50)] {
                assert_eq!(absorbed(&sizes, &[(position, len)]), 1, "{sizes:?}: {len} at {position}");
            }
        }
    }

    #[test]
    fn a_pass_is_cut_where_it_costs_least() {
        let sizes = preset("deepseek-v2-lite");
        assert_eq!(absorbed(&sizes, &[(3000, 1), (10, 1), (512, 512)]), 2);
        assert_eq!(absorbed(&sizes, &[(3000, 1), (0, 512), (0, 300)]), 1);
        // A short one that comes last is expanded with the others, unless that costs more than they save.
        assert_eq!(absorbed(&sizes, &[(3000, 1), (0, 512), (0, 10)]), 1);
        assert_eq!(absorbed(&sizes, &[(0, 512), (32_000, 1)]), 2);
        let lengths = [(0, 1), (0, 90), (700, 2), (64, 40), (4000, 60), (0, 7), (100, 100), (2000, 1)];
        for first in 0..lengths.len() {
            for last in first..=lengths.len() {
                let segments = &lengths[first..last];
                let saved = |cut: usize| -> i64 {
                    segments[cut..].iter().map(|(at, len)| sizes.saving(*len as u64, (at + len) as u64)).sum()
                };
                let best = saved(absorbed(&sizes, segments));
                assert!((0..=segments.len()).all(|cut| saved(cut) <= best), "{segments:?}");
            }
        }
    }

    #[test]
    fn what_is_expanded_is_bounded() {
        for (name, tokens) in [("deepseek-v2-lite", 94_208), ("deepseek-v3", 12_864)] {
            let sizes = preset(name);
            assert_eq!(sizes.most_blocks() * BLOCK_SIZE, tokens);
            assert_eq!(absorbed(&sizes, &[(0, tokens)]), 0, "{name}");
            assert_eq!(absorbed(&sizes, &[(0, tokens + 1)]), 1, "{name}");
            let prompts = vec![(0, 4096); 64];
            assert_eq!(absorbed(&sizes, &prompts), 64 - tokens / 4096, "{name}");
        }
    }

    #[test]
    fn heads_that_have_no_kernel_stay_latents() {
        let lite = preset("deepseek-v2-lite");
        for sizes in [LatentSizes { head: 200, ..lite }, LatentSizes { value: 136, ..lite }] {
            assert_eq!(absorbed(&sizes, &[(0, 4096)]), 1, "{sizes:?}");
        }
    }

    /// What the GPU tests hang on (`tests/gpu/latent.rs`): which prompts go which way.
    #[test]
    fn tested_prompts_go_both_ways() {
        let lite = preset("deepseek-v2-lite");
        for position in 0..20 {
            assert_eq!(absorbed(&lite, &[(32 * position, 32)]), 1);
        }
        assert_eq!([(0, 640), (0, 320), (320, 320)].map(|segment| absorbed(&lite, &[segment])), [0; 3]);
        let sizes = golden();
        for (segments, expected) in [
            (&[(0, 24), (0, 24)][..], 2),
            (&[(0, 200)], 0),
            (&[(0, 130)], 0),
            (&[(130, 70)], 0),
            (&[(130, 1)], 1),
            (&[(64, 1), (3, 2), (64, 136), (0, 90)], 2),
        ] {
            assert_eq!(absorbed(&sizes, segments), expected, "{segments:?}");
        }
    }
}
