//! Shapes of published layers.

use crate::failure::Failure;
use anabranch::{Renormalize, Routing, Score};

/// A published layer, or all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Preset {
    /// DeepSeekMoE-16B, DeepSeek-V2-Lite: 6 of 64 experts, 2048 by 1408
    Dsmoe16b,
    /// DeepSeek-V3: 8 of 256, 7168 by 2048
    Dsv3,
    /// Mixtral-8x7B: 2 of 8, 4096 by 14336
    Mixtral,
    /// Qwen3-30B-A3B: 8 of 128, 2048 by 768
    Qwen3,
    /// A 7B model with fine-grained experts: 8 of 128, 1536 by 256
    Sonic7b,
    /// Many tokens, wide rows: 8 of 128, 4096 by 1024
    Sonic4k,
    /// Each of the above
    All,
}

/// A layer to measure, and with how many tokens.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Shape {
    pub(super) name: String,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) experts: usize,
    pub(super) topk: usize,
    pub(super) tokens: Vec<usize>,
}

/// Decoding, small batches, prefill.
const TOKENS: [usize; 6] = [1, 8, 64, 512, 4096, 16_384];

impl Preset {
    /// The shapes it stands for, with the tokens at which they are usually measured.
    pub(super) fn shapes(self) -> Vec<Shape> {
        let shape = |name: &str, [hidden, intermediate, experts, topk]: [usize; 4], tokens: &[usize]| {
            vec![Shape { name: name.to_owned(), hidden, intermediate, experts, topk, tokens: tokens.to_vec() }]
        };
        match self {
            Self::Dsmoe16b => shape("dsmoe16b", [2048, 1408, 64, 6], &TOKENS),
            Self::Dsv3 => shape("dsv3", [7168, 2048, 256, 8], &TOKENS),
            Self::Mixtral => shape("mixtral", [4096, 14_336, 8, 2], &TOKENS),
            Self::Qwen3 => shape("qwen3", [2048, 768, 128, 8], &TOKENS),
            Self::Sonic7b => shape("sonic7b", [1536, 256, 128, 8], &[24_576]),
            Self::Sonic4k => shape("sonic4k", [4096, 1024, 128, 8], &[32_768]),
            Self::All => {
                let each = [Self::Dsmoe16b, Self::Dsv3, Self::Mixtral, Self::Qwen3, Self::Sonic7b, Self::Sonic4k];
                each.into_iter().flat_map(Self::shapes).collect()
            }
        }
    }
}

impl Shape {
    /// Softmax over the top-k logits.
    pub(super) fn routing(&self) -> Result<Routing, Failure> {
        let rule = Routing::builder(self.experts, self.topk).score(Score::Softmax).renormalize(Renormalize::Sum);
        rule.build().map_err(Failure::from)
    }

    /// Elements of an expert's three matrices.
    pub(super) fn expert(&self) -> usize {
        3 * self.hidden * self.intermediate
    }
}
