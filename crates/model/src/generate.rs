//! Generation: prompts in, text out, for sequences of different lengths side by side.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anabranch::Sampling;

use crate::{
    Engine, Error, Event, Finish, Forward, Limits, Request, Result, TextStream, Tokenizer, blocks_for,
    engine::{check, longest},
};

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
    /// Most sequences that run side by side; the others wait. At least 1.
    pub batch_size: usize,
    /// Tokens that the cache holds, of all sequences, up to a block of [`BLOCK_SIZE`](crate::BLOCK_SIZE) more; with less than they come
    /// to need, the youngest sequences wait. `None` for as many as the `batch_size` longest sequences may need.
    pub cache_tokens: Option<usize>,
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
    /// Time for them. Of a pass that does both, as large a part as prompts have of its tokens.
    pub prefill: Duration,
    /// All new tokens.
    pub new_tokens: usize,
    /// Those after the first of each sequence, which the prefill yields.
    pub decoded_tokens: usize,
    /// Time for `decoded_tokens`, which is what `prefill` leaves.
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

impl GenerateOptions {
    /// Blocks of the cache for these prompts, where the model has so many positions.
    pub fn cache_blocks(&self, prompts: &[Vec<u32>], max_position_embeddings: usize) -> usize {
        let tokens =
            |prompt: &Vec<u32>| longest(prompt, self.max_new_tokens, max_position_embeddings).saturating_sub(1);
        let mut needed: Vec<usize> = prompts.iter().map(|prompt| blocks_for(tokens(prompt))).collect();
        needed.sort_unstable_by(|a, b| b.cmp(a));
        let most = needed.iter().take(self.batch_size).fold(0_usize, |sum, blocks| sum.saturating_add(*blocks));
        self.cache_tokens.map_or(most, |tokens| blocks_for(tokens).min(most))
    }
}

/// Continues each prompt, in an [`Engine`]. Text goes to `on_text` with its prompt's index as soon as it is certain, never empty; all of
/// a sequence's pieces together are its [`Generation::text`]. `cancelled` is asked before every pass of the model.
///
/// # Errors
/// Before anything is computed, [`Error::Input`] if there are no prompts, or one is empty, holds an id that the model does
/// not have, leaves no position for a new token or may not fit the cache, or if an option is out of range. Then [`Error::Interrupted`] if
/// `cancelled` says so, and whatever `model` or `on_text` return; text already given to `on_text` stands.
pub fn generate(
    model: &mut dyn Forward,
    tokenizer: &Tokenizer,
    prompts: &[Vec<u32>],
    options: &GenerateOptions,
    cancelled: &dyn Fn() -> bool,
    on_text: &mut dyn FnMut(usize, &str) -> Result<()>,
) -> Result<Generated> {
    if prompts.is_empty() {
        return Err(Error::Input("there is no prompt: give at least one".to_owned()));
    }
    if options.batch_size == 0 {
        return Err(Error::Input("batch_size must be at least 1, got 0".to_owned()));
    }
    for (index, prompt) in prompts.iter().enumerate() {
        check(&format!("prompt {index}"), model, prompt, options.max_new_tokens)?;
    }
    let mut texts = prompts.iter().map(|_| Text::new(tokenizer, options)).collect::<Result<Vec<_>>>()?;
    let blocks = options.cache_blocks(prompts, model.max_position_embeddings());
    let limits = Limits { running: options.batch_size, ..Limits::new(blocks) };
    let mut engine = Engine::new(model, limits)?;
    let mut requests = BTreeMap::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let request = Request {
            prompt: prompt.clone(),
            max_new_tokens: options.max_new_tokens,
            sampling: options.sampling,
            seed: options.seed,
            stream: index as u64,
            eos: options.eos.clone(),
        };
        requests.insert(engine.submit(request)?, index);
    }

    let (mut prefill, mut decode) = (Duration::ZERO, Duration::ZERO);
    while !engine.is_idle() {
        if cancelled() {
            return Err(Error::Interrupted);
        }
        let start = Instant::now();
        let step = engine.step()?;
        for event in step.events {
            let (request, id, finish) = match event {
                Event::Token { request, id, finish } => (request, id, finish),
                Event::Failed { error, .. } => return Err(error),
            };
            let Some(&index) = requests.get(&request) else { continue };
            let text = &mut texts[index];
            let piece = text.push(id, finish)?;
            if !piece.is_empty() {
                on_text(index, &piece)?;
            }
            if text.finish.is_some() {
                engine.cancel(request);
            }
        }
        let took = start.elapsed();
        let part = step.prompt_tokens as f64 / (step.prompt_tokens + step.decode_tokens).max(1) as f64;
        prefill += took.mul_f64(part);
        decode += took.mul_f64(1.0 - part);
    }

    let sequences: Vec<Generation> = texts.into_iter().map(Text::into_generation).collect();
    let new_tokens = sequences.iter().map(|sequence| sequence.ids.len()).sum();
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let stats = Stats { prompt_tokens, prefill, new_tokens, decoded_tokens: new_tokens - prompts.len(), decode };
    Ok(Generated { sequences, stats })
}

/// What a prompt's tokens say so far.
struct Text<'a> {
    ids: Vec<u32>,
    stream: TextStream<'a>,
    certain: String,
    finish: Option<Finish>,
}

impl<'a> Text<'a> {
    fn new(tokenizer: &'a Tokenizer, options: &'a GenerateOptions) -> Result<Self> {
        let stream = TextStream::new(tokenizer, &options.stop)?;
        Ok(Self { ids: Vec::new(), stream, certain: String::new(), finish: None })
    }

    /// Adds a token, the last one if there is a reason, and returns the text that is certain with it.
    fn push(&mut self, id: u32, finish: Option<Finish>) -> Result<String> {
        self.ids.push(id);
        self.finish = finish;
        let mut piece = String::new();
        if finish != Some(Finish::Eos) {
            piece = self.stream.push(id)?;
            if self.stream.stopped() {
                self.finish = Some(Finish::Stop);
            }
        }
        if self.finish.is_some() {
            piece.push_str(&self.stream.finish()?);
            // A stop string of U+FFFD is only certain at the end.
            if self.stream.stopped() {
                self.finish = Some(Finish::Stop);
            }
        }
        self.certain.push_str(&piece);
        Ok(piece)
    }

    fn into_generation(self) -> Generation {
        let Self { ids, certain, finish, .. } = self;
        Generation { ids, text: certain, finish: finish.unwrap_or(Finish::Length) }
    }
}
