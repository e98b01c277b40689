//! Generation: prompts in, text out, for sequences of different lengths side by side.

use std::time::{Duration, Instant};

use anabranch::{Sampling, reference::sample};
use rand_chacha::{
    ChaCha12Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::{Batch, Error, Result, Segment, TextStream, Tokenizer};

/// Most tokens of one pass over the prompts. Bounds the memory for activations and the wait for an interruption.
pub(crate) const PREFILL_TOKENS: usize = 512;

/// What generation needs of a model: logits after each segment of a batch.
pub trait Forward {
    /// Number of logits of a token.
    fn vocab_size(&self) -> usize;

    /// The longest sequence, in tokens.
    fn max_position_embeddings(&self) -> usize;

    /// Forgets all sequences and makes room for new ones, `capacities[i]` tokens for sequence `i`.
    ///
    /// # Errors
    /// If there is not enough memory.
    fn reset(&mut self, capacities: &[usize]) -> Result<()>;

    /// Adds a batch's tokens to their sequences and returns the logits that follow the last token of each segment:
    /// `[segments, vocab_size]`, row-major.
    ///
    /// # Errors
    /// If the batch does not continue its sequences, or an operation fails.
    fn forward(&mut self, batch: &Batch<'_>) -> Result<Vec<f32>>;
}

/// How to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// Most tokens to add to each prompt; at least 1.
    pub max_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Sequence `i` draws from stream `i` of this seed, so its tokens do not depend on what shares the batch.
    pub seed: u64,
    /// Texts that end a sequence; they are not part of its text.
    pub stop: Vec<String>,
    /// Tokens that end a sequence.
    pub eos: Vec<u32>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model said so, with an EOS token.
    Eos,
    /// A stop string came up.
    Stop,
    /// `max_new_tokens`, or all positions of the model, are used up.
    Length,
}

/// A generated sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// All new tokens, with the EOS token and those of a stop string.
    pub ids: Vec<u32>,
    /// Their text, without special tokens and up to the stop string.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
}

/// How long a run took, all sequences together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Time from the first prompt token to the first new token of every sequence.
    pub prefill: Duration,
    /// All new tokens.
    pub new_tokens: usize,
    /// Those after the first of each sequence, which the prefill yields.
    pub decoded_tokens: usize,
    /// Time for `decoded_tokens`.
    pub decode: Duration,
}

/// What a run gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// One per prompt, in order.
    pub sequences: Vec<Generation>,
    /// How long it took.
    pub stats: Stats,
}

/// Continues each prompt. Text goes to `on_text` with its prompt's index as soon as it is certain, never empty; all of
/// a sequence's pieces together are its [`Generation::text`]. `cancelled` is asked before every pass of the model.
///
/// # Errors
/// Before anything is computed, [`Error::Input`] if there are no prompts, or one is empty, holds an id that the model does
/// not have or leaves no position for a new token, or if an option is out of range. Then [`Error::Interrupted`] if
/// `cancelled` says so, and whatever `model` or `on_text` return; text already given to `on_text` stands.
pub fn generate(
    model: &mut dyn Forward,
    tokenizer: &Tokenizer,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    cancelled: &dyn Fn() -> bool,
    on_text: &mut dyn FnMut(usize, &str) -> Result<()>,
) -> Result<Generated> {
    check(model, prompts, options)?;
    let most_positions = model.max_position_embeddings();
    let mut sequences = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| {
            let most = prompt.len().saturating_add(options.max_new_tokens).min(most_positions);
            Sequence::new(index, prompt, most, tokenizer, options)
        })
        .collect::<Result<Vec<_>>>()?;
    let capacities: Vec<usize> = sequences.iter().map(|sequence| sequence.most).collect();
    model.reset(&capacities)?;

    let start = Instant::now();
    while sequences.iter().any(Sequence::in_prompt) {
        let scheduled = schedule(sequences.iter().map(|s| s.prompt_len.saturating_sub(s.computed)));
        step(model, &mut sequences, &scheduled, cancelled, on_text)?;
    }
    let prefill = start.elapsed();

    let start = Instant::now();
    loop {
        let running = sequences.iter().filter(|sequence| sequence.finish.is_none());
        let scheduled: Vec<(usize, usize)> = running.map(|sequence| (sequence.index, 1)).collect();
        if scheduled.is_empty() {
            break;
        }
        step(model, &mut sequences, &scheduled, cancelled, on_text)?;
    }
    let decode = start.elapsed();

    let sequences: Vec<Generation> = sequences.into_iter().map(Sequence::into_generation).collect();
    let new_tokens = sequences.iter().map(|sequence| sequence.ids.len()).sum();
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let stats = Stats { prompt_tokens, prefill, new_tokens, decoded_tokens: new_tokens - prompts.len(), decode };
    Ok(Generated { sequences, stats })
}

/// Refuses what cannot be generated from.
fn check(model: &dyn Forward, prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<()> {
    if prompts.is_empty() {
        return Err(Error::Input("there is no prompt: give at least one".to_owned()));
    }
    if options.max_new_tokens == 0 {
        return Err(Error::Input("max_new_tokens must be at least 1, got 0".to_owned()));
    }
    let (vocab_size, most) = (model.vocab_size(), model.max_position_embeddings());
    for (index, prompt) in prompts.iter().enumerate() {
        if prompt.is_empty() {
            return Err(Error::Input(format!("prompt {index} is empty: give it at least one token")));
        }
        if prompt.len() >= most {
            return Err(Error::Input(format!(
                "prompt {index} has {} tokens, but the model has {most} positions (max_position_embeddings) for prompt \
                 and output together: shorten it to {} at most",
                prompt.len(),
                most.saturating_sub(1)
            )));
        }
        if let Some((at, id)) = prompt.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
            return Err(Error::Input(format!(
                "prompt {index} holds the token id {id} at position {at}, but the model's vocabulary has {vocab_size}: \
                 the tokenizer is not this model's"
            )));
        }
    }
    Ok(())
}

/// Which sequences go into a pass over the prompts, and how many of their tokens, given how many each has left. A sequence
/// is always cut at the same places, whatever shares the pass.
fn schedule(left: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
    let mut room = PREFILL_TOKENS;
    let mut scheduled = Vec::new();
    for (index, left) in left.enumerate() {
        let len = left.min(PREFILL_TOKENS);
        if len > 0 && len <= room {
            room -= len;
            scheduled.push((index, len));
        }
    }
    scheduled
}

/// One pass of the model over the next `len` tokens of each scheduled sequence, and a new token for each whose tokens
/// are then all computed.
fn step(
    model: &mut dyn Forward,
    sequences: &mut [Sequence<'_>],
    scheduled: &[(usize, usize)],
    cancelled: &dyn Fn() -> bool,
    on_text: &mut dyn FnMut(usize, &str) -> Result<()>,
) -> Result<()> {
    if cancelled() {
        return Err(Error::Interrupted);
    }
    let mut ids = Vec::new();
    let mut segments = Vec::with_capacity(scheduled.len());
    for &(index, len) in scheduled {
        let sequence = &mut sequences[index];
        let position = sequence.computed;
        sequence.computed += len;
        ids.extend_from_slice(&sequence.ids[position..sequence.computed]);
        segments.push(Segment { sequence: index, position, len });
    }
    let logits = model.forward(&Batch { ids: &ids, segments: &segments })?;
    let vocab_size = model.vocab_size();
    if logits.len() != segments.len() * vocab_size {
        let expected = format!("{} rows of {vocab_size}", segments.len());
        let (operation, argument, got) = ("generate", "logits", logits.len().to_string());
        return Err(anabranch::Error::Shape { operation, argument, expected, got }.into());
    }
    for (row, &(index, _)) in logits.chunks_exact(vocab_size).zip(scheduled) {
        let sequence = &mut sequences[index];
        if sequence.computed == sequence.ids.len() {
            let piece = sequence.advance(row)?;
            if !piece.is_empty() {
                on_text(index, &piece)?;
            }
        }
    }
    Ok(())
}

/// A prompt and what was made of it so far.
struct Sequence<'a> {
    index: usize,
    /// Prompt and new tokens.
    ids: Vec<u32>,
    prompt_len: usize,
    /// How many of `ids` the model has seen.
    computed: usize,
    /// How many `ids` there may be.
    most: usize,
    options: &'a GenerateOptions,
    random: ChaCha12Rng,
    stream: TextStream<'a>,
    text: String,
    finish: Option<Finish>,
}

impl<'a> Sequence<'a> {
    fn new(
        index: usize,
        prompt: &[u32],
        most: usize,
        tokenizer: &'a Tokenizer,
        options: &'a GenerateOptions,
    ) -> Result<Self> {
        let mut random = ChaCha12Rng::seed_from_u64(options.seed);
        random.set_stream(index as u64);
        Ok(Self {
            index,
            ids: prompt.to_vec(),
            prompt_len: prompt.len(),
            computed: 0,
            most,
            options,
            random,
            stream: TextStream::new(tokenizer, &options.stop)?,
            text: String::new(),
            finish: None,
        })
    }

    fn in_prompt(&self) -> bool {
        self.computed < self.prompt_len
    }

    /// Draws the next token and returns the text that is certain with it.
    fn advance(&mut self, logits: &[f32]) -> Result<String> {
        // 53 bits, all that a float64 in [0, 1) distinguishes evenly.
        let u = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let id = sample(&self.options.sampling, logits, &self.ids, u)?;
        self.ids.push(id);
        let mut piece = String::new();
        if self.options.eos.contains(&id) {
            self.finish = Some(Finish::Eos);
        } else {
            piece = self.stream.push(id)?;
            if self.stream.stopped() {
                self.finish = Some(Finish::Stop);
            } else if self.ids.len() >= self.most {
                self.finish = Some(Finish::Length);
            }
        }
        if self.finish.is_some() {
            piece.push_str(&self.stream.finish()?);
            // A stop string of U+FFFD is only certain at the end.
            if self.stream.stopped() {
                self.finish = Some(Finish::Stop);
            }
        }
        self.text.push_str(&piece);
        Ok(piece)
    }

    fn into_generation(self) -> Generation {
        let Self { mut ids, prompt_len, text, finish, .. } = self;
        ids.drain(..prompt_len);
        Generation { ids, text, finish: finish.unwrap_or(Finish::Length) }
    }
}
