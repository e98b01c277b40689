//! Continuous batching: requests join and leave between the passes of a model, and share its cache.
//!
//! Every pass takes a token of each request that decodes, and pieces of the prompts of new ones beside them (chunked prefill). Requests
//! come in the order in which they were submitted. If the cache is full, the youngest gives its blocks back and computes again later
//! what it held. What a request gets depends on the request alone, but for rounding: a pass of another size, or keys that another
//! request with the same beginning has computed, may round differently.

use std::collections::VecDeque;

use anabranch::Sampling;
use rand_chacha::{
    ChaCha12Rng,
    rand_core::{RngCore, SeedableRng},
};

use crate::{
    BLOCK_SIZE, Batch, Draw, Error, Result, Segment,
    backend::draw_rows,
    blocks::{Pool, Table},
};

/// What generation needs of a model: logits after each segment of a batch, or tokens.
pub trait Forward {
    /// Number of logits of a token.
    fn vocab_size(&self) -> usize;

    /// The longest sequence, in tokens.
    fn max_position_embeddings(&self) -> usize;

    /// Forgets everything and makes a cache of so many blocks of [`BLOCK_SIZE`](crate::BLOCK_SIZE) tokens.
    ///
    /// # Errors
    /// If there is not enough memory.
    fn reset(&mut self, blocks: usize) -> Result<()>;

    /// Adds a batch's tokens to their sequences and returns the logits that follow the last token of each segment:
    /// `[segments, vocab_size]`, row-major. A call that failed may be repeated.
    ///
    /// # Errors
    /// If the batch does not continue its sequences, or an operation fails.
    fn forward(&mut self, batch: &Batch<'_>) -> Result<Vec<f32>>;

    /// [`Forward::forward`], of whose rows it returns the tokens that are drawn from them, one draw a segment: who computes elsewhere
    /// than on the host need not bring logits there.
    ///
    /// # Errors
    /// Those of [`Forward::forward`], and if there are not as many draws as segments. A row without a distribution is its own error.
    fn sample(&mut self, batch: &Batch<'_>, draws: &[Draw<'_>]) -> Result<Vec<Result<u32>>> {
        draw_rows(&self.forward(batch)?, self.vocab_size(), draws)
    }
}

impl<F: Forward + ?Sized> Forward for &mut F {
    fn vocab_size(&self) -> usize {
        (**self).vocab_size()
    }

    fn max_position_embeddings(&self) -> usize {
        (**self).max_position_embeddings()
    }

    fn reset(&mut self, blocks: usize) -> Result<()> {
        (**self).reset(blocks)
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<Vec<f32>> {
        (**self).forward(batch)
    }

    fn sample(&mut self, batch: &Batch<'_>, draws: &[Draw<'_>]) -> Result<Vec<Result<u32>>> {
        (**self).sample(batch, draws)
    }
}

/// What an engine may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Blocks of the cache, of [`BLOCK_SIZE`](crate::BLOCK_SIZE) tokens each.
    pub blocks: usize,
    /// Most requests that run side by side; the others wait.
    pub running: usize,
    /// Most tokens of prompts in one pass, beside one token of each request that decodes or has only one left. A prompt is cut at its
    /// multiples, whatever shares the pass.
    pub prompt_tokens: usize,
}

impl Limits {
    /// 64 requests, and 512 tokens of prompts a pass.
    pub const fn new(blocks: usize) -> Self {
        Self { blocks, running: 64, prompt_tokens: 512 }
    }
}

/// What is to be generated.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to add; at least 1. The model's positions are another limit.
    pub max_new_tokens: usize,
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Random numbers come from this stream of this seed, so that they do not depend on other requests.
    pub seed: u64,
    /// See `seed`.
    pub stream: u64,
    /// Tokens that end the sequence.
    pub eos: Vec<u32>,
}

/// Names a request in its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model said so, with an EOS token.
    Eos,
    /// A stop string came up, which [`generate`](crate::generate()) looks for and the engine does not.
    Stop,
    /// `max_new_tokens`, or all positions of the model, are used up.
    Length,
}

/// What became of a request in a step.
#[derive(Debug)]
pub enum Event {
    /// A new token. With a reason it is the last one, and the engine has forgotten the request.
    Token {
        /// Whose it is.
        request: RequestId,
        /// The token.
        id: u32,
        /// Why it is the last one, if it is.
        finish: Option<Finish>,
    },
    /// Its logits are no distribution to draw from; the engine has forgotten the request. The others are as they were.
    Failed {
        /// Whose they are.
        request: RequestId,
        /// What is wrong with them.
        error: Error,
    },
}

/// What a step did.
#[derive(Debug, Default)]
pub struct Step {
    /// At most one of each request, in the order of their submission.
    pub events: Vec<Event>,
    /// Tokens of prompts that went through the model, with what was computed again.
    pub prompt_tokens: usize,
    /// Tokens of decoding that did.
    pub decode_tokens: usize,
}

/// Runs requests over a model, step by step.
#[derive(Debug)]
pub struct Engine<F> {
    model: F,
    limits: Limits,
    pool: Pool,
    /// In the order of submission, as `running` is; all of them younger than those.
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    submitted: u64,
}

impl<F: Forward> Engine<F> {
    /// An engine with a new cache.
    ///
    /// # Errors
    /// [`Error::Input`] if a limit is 0, and whatever [`Forward::reset`] returns.
    pub fn new(mut model: F, limits: Limits) -> Result<Self> {
        if limits.blocks == 0 || limits.running == 0 || limits.prompt_tokens == 0 {
            return Err(Error::Input(format!("an engine's limits must be at least 1, got {limits:?}")));
        }
        model.reset(limits.blocks)?;
        let pool = Pool::new(limits.blocks);
        Ok(Self { model, limits, pool, waiting: VecDeque::new(), running: Vec::new(), submitted: 0 })
    }

    /// Takes a request, which waits for its turn.
    ///
    /// # Errors
    /// [`Error::Input`] if the prompt is empty, holds an id that the model does not have or leaves no position for a new token, if
    /// `max_new_tokens` is 0, or if the whole cache could not hold the longest sequence that it may become.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        check("the prompt", &self.model, &request.prompt, request.max_new_tokens)?;
        let most = longest(&request.prompt, request.max_new_tokens, self.model.max_position_embeddings());
        let (needed, held) = (most - 1, self.limits.blocks.saturating_mul(BLOCK_SIZE));
        if needed > held {
            return Err(Error::Input(format!(
                "a prompt of {} tokens with its output may need {needed} tokens of cache, which holds {held}: make the cache larger, \
                 or max_new_tokens smaller",
                request.prompt.len()
            )));
        }
        let id = RequestId(self.submitted);
        self.submitted += 1;
        self.waiting.push_back(Sequence::new(id, request, most));
        Ok(id)
    }

    /// Drops a request, whatever it is doing, and says whether there was one to drop.
    pub fn cancel(&mut self, request: RequestId) -> bool {
        if let Some(index) = self.running.iter().position(|sequence| sequence.id == request) {
            self.pool.release(self.running.remove(index).table);
            return true;
        }
        let waiting = self.waiting.len();
        self.waiting.retain(|sequence| sequence.id != request);
        self.waiting.len() < waiting
    }

    /// Whether no request is left.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Requests that hold a part of the cache.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Requests that wait for their turn, or for their next one.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Blocks of the cache that no request holds.
    pub fn free_blocks(&self) -> usize {
        self.pool.available()
    }

    /// One pass of the model: a token of everything that decodes, and pieces of prompts. Without requests it does nothing.
    ///
    /// # Errors
    /// Whatever the model returns, which loses nothing: the next step tries the same pass again.
    pub fn step(&mut self) -> Result<Step> {
        let scheduled = self.schedule();
        if scheduled.is_empty() {
            return Ok(Step::default());
        }
        let mut ids = Vec::new();
        let (mut segments, mut draws) = (Vec::with_capacity(scheduled.len()), Vec::with_capacity(scheduled.len()));
        for &(index, len) in &scheduled {
            let sequence = &self.running[index];
            let Sequence { ids: all, computed: position, table, .. } = sequence;
            ids.extend_from_slice(&all[*position..position + len]);
            segments.push(Segment { blocks: &table.blocks, position: *position, len });
            draws.push(sequence.draw(len));
        }
        let next = self.model.sample(&Batch { ids: &ids, segments: &segments }, &draws)?;
        if next.len() != segments.len() {
            let (expected, got) = (format!("one for each of {} segments", segments.len()), next.len().to_string());
            let (operation, argument) = ("engine", "tokens");
            return Err(anabranch::Error::Shape { operation, argument, expected, got }.into());
        }

        let mut step = Step::default();
        for (next, &(index, len)) in next.into_iter().zip(&scheduled) {
            let sequence = &mut self.running[index];
            *if len > 1 || sequence.in_prompt() { &mut step.prompt_tokens } else { &mut step.decode_tokens } += len;
            sequence.computed += len;
            self.pool.learn(&mut sequence.table, &sequence.ids[..sequence.computed]);
            if sequence.left() == 0 {
                step.events.push(sequence.advance(next));
            }
        }
        for done in self.running.extract_if(.., |sequence| sequence.done) {
            self.pool.release(done.table);
        }
        Ok(step)
    }

    /// Which running requests go into the next pass, and how many of their tokens. Makes room for these in the cache.
    fn schedule(&mut self) -> Vec<(usize, usize)> {
        let mut room = self.limits.prompt_tokens;
        let mut scheduled = Vec::new();
        let mut index = 0;
        // The oldest comes first and may take from all others, so that it always gets on.
        while index < self.running.len() || self.admit(room) {
            if !self.make_room(index) {
                break;
            }
            let len = self.running[index].piece(self.limits.prompt_tokens);
            if len == 1 || len <= room {
                room -= if len == 1 { 0 } else { len };
                scheduled.push((index, len));
            }
            index += 1;
        }
        scheduled
    }

    /// Lets the first that waits run, if there is room for its first piece in the pass, and for all its tokens in the cache.
    fn admit(&mut self, room: usize) -> bool {
        if self.running.len() >= self.limits.running {
            return false;
        }
        let Some(mut sequence) = self.waiting.pop_front() else { return false };
        sequence.table = self.pool.begin(&sequence.ids);
        sequence.computed = sequence.table.known_tokens();
        let piece = sequence.piece(self.limits.prompt_tokens);
        let admitted = (piece == 1 || piece <= room) && self.pool.grow(&mut sequence.table, sequence.ids.len());
        if admitted {
            self.running.push(sequence);
        } else {
            self.send_back(sequence);
        }
        admitted
    }

    /// Makes a running request's table long enough for all its tokens, at the cost of the youngest ones; false if that is itself.
    fn make_room(&mut self, index: usize) -> bool {
        while let Some(sequence) = self.running.get_mut(index) {
            if self.pool.grow(&mut sequence.table, sequence.ids.len()) {
                return true;
            }
            let youngest = self.running.pop();
            youngest.into_iter().for_each(|youngest| self.send_back(youngest));
        }
        false
    }

    /// Lets a request wait, first of all, without a part of the cache.
    fn send_back(&mut self, mut sequence: Sequence) {
        sequence.computed = 0;
        self.pool.release(std::mem::take(&mut sequence.table));
        self.waiting.push_front(sequence);
    }
}

/// Refuses a prompt that cannot be generated from, by the name that the caller has for it.
pub(crate) fn check<F: Forward + ?Sized>(name: &str, model: &F, prompt: &[u32], max_new_tokens: usize) -> Result<()> {
    if max_new_tokens == 0 {
        return Err(Error::Input("max_new_tokens must be at least 1, got 0".to_owned()));
    }
    if prompt.is_empty() {
        return Err(Error::Input(format!("{name} is empty: give it at least one token")));
    }
    let (vocab_size, most) = (model.vocab_size(), model.max_position_embeddings());
    if prompt.len() >= most {
        return Err(Error::Input(format!(
            "{name} has {} tokens, but the model has {most} positions (max_position_embeddings) for prompt and output \
             together: shorten it to {} at most",
            prompt.len(),
            most.saturating_sub(1)
        )));
    }
    match prompt.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
        Some((at, id)) => Err(Error::Input(format!(
            "{name} holds the token id {id} at position {at}, but the model's vocabulary has {vocab_size}: the tokenizer \
             is not this model's"
        ))),
        None => Ok(()),
    }
}

/// Tokens of the longest sequence that a prompt may become. The last of them is never computed.
pub(crate) fn longest(prompt: &[u32], max_new_tokens: usize, max_position_embeddings: usize) -> usize {
    prompt.len().saturating_add(max_new_tokens).min(max_position_embeddings)
}

/// A request and what was made of it so far.
#[derive(Debug)]
struct Sequence {
    id: RequestId,
    /// Prompt and new tokens.
    ids: Vec<u32>,
    prompt_len: usize,
    /// How many of `ids` are in the cache.
    computed: usize,
    table: Table,
    /// How many `ids` there may be.
    most: usize,
    sampling: Sampling,
    random: ChaCha12Rng,
    /// The next token's number of these, there before the pass, so that one that failed is tried again with it.
    u: f64,
    eos: Vec<u32>,
    done: bool,
}

impl Sequence {
    fn new(id: RequestId, request: Request, most: usize) -> Self {
        let Request { prompt, sampling, seed, stream, eos, .. } = request;
        let mut random = ChaCha12Rng::seed_from_u64(seed);
        random.set_stream(stream);
        let u = uniform(&mut random);
        Self {
            id,
            prompt_len: prompt.len(),
            ids: prompt,
            computed: 0,
            table: Table::default(),
            most,
            sampling,
            random,
            u,
            eos,
            done: false,
        }
    }

    fn in_prompt(&self) -> bool {
        self.computed < self.prompt_len
    }

    /// Tokens that are still to be computed.
    fn left(&self) -> usize {
        self.ids.len() - self.computed
    }

    /// How many of them go into one pass.
    fn piece(&self, most: usize) -> usize {
        self.left().min(most - self.computed % most)
    }

    /// How the token after the next `len` ones is drawn. Where that is known, it costs least to take the most probable.
    fn draw(&self, len: usize) -> Draw<'_> {
        if len < self.left() {
            return Draw::greedy();
        }
        Draw { sampling: self.sampling, seen: &self.ids, u: self.u }
    }

    /// Takes the next token.
    fn advance(&mut self, next: Result<u32>) -> Event {
        let request = self.id;
        self.u = uniform(&mut self.random);
        let id = match next {
            Ok(id) => id,
            Err(error) => {
                self.done = true;
                return Event::Failed { request, error };
            }
        };
        self.ids.push(id);
        let finish = if self.eos.contains(&id) {
            Some(Finish::Eos)
        } else {
            (self.ids.len() >= self.most).then_some(Finish::Length)
        };
        self.done = finish.is_some();
        Event::Token { request, id, finish }
    }
}

/// In [0, 1): 53 bits, all that a float64 there distinguishes evenly.
fn uniform(random: &mut ChaCha12Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
