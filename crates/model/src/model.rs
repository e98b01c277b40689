//! A model: weights on a backend, and the forward pass, written once for every family.

use std::{collections::BTreeMap, path::Path};

use crate::{
    Backend, Batch, Block, Checkpoint, Config, Cpu, Draw, Error, Forward, Result,
    backend::{Routed, TopkIds},
    config::FeedForward,
    weights::{Origin, Weights},
};

/// Experts to take instead of the router's choice, by layer: `[T, K]` ids of all tokens of a pass.
pub type GivenRouting = BTreeMap<usize, TopkIds>;

/// Sees what a forward pass computes on its way.
pub trait Observer {
    /// Hidden states `[tokens, d]`: the embedding at 0, then the residual stream after each block; the last one, at the number of
    /// blocks, after the final norm (as Transformers gives them).
    fn hidden(&mut self, index: usize, values: Vec<f32>);
    /// The experts that layer `layer`'s router chose, or that were given for it.
    fn topk(&mut self, layer: usize, ids: TopkIds);
    /// The logits `[tokens, E]` that the router of layer `layer` chose by. Who does not care leaves it out.
    fn router_logits(&mut self, layer: usize, logits: Vec<f32>) {
        let _ = (layer, logits);
    }
}

/// A loaded model.
pub struct Model<B: Backend = Cpu> {
    config: Config,
    backend: B,
    embedding: B::Table,
    blocks: Vec<Block<B>>,
    norm: B::Norm,
    /// `None` if it is the embedding table.
    head: Option<B::Table>,
}

impl<B: Backend> Model<B> {
    /// Loads a checkpoint folder in the Hugging Face layout. `progress` is told how many of how many blocks are loaded.
    ///
    /// # Errors
    /// If the configuration or a weight is missing, malformed or of another shape, naming the file and what was expected.
    pub fn load(dir: &Path, backend: B, progress: &mut dyn FnMut(usize, usize)) -> Result<Self> {
        let config = Config::from_dir(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let model = Self::build(config, Origin::Checkpoint(&checkpoint), backend, progress)?;
        tracing::info!(
            model_type = model.config.model_type,
            blocks = model.blocks.len(),
            bytes = checkpoint.total_bytes(),
            "loaded {}",
            dir.display()
        );
        Ok(model)
    }

    /// A model of this architecture with random weights, distributed as [`init`](crate::init::init) has them but without
    /// quantisation: for sizes and speeds, on a backend that makes them where it computes. The same seed gives the same weights.
    ///
    /// # Errors
    /// [`Error::Input`] if the backend is the CPU's, or whatever the backend refuses.
    pub fn random(mut config: Config, seed: u64, backend: B, progress: &mut dyn FnMut(usize, usize)) -> Result<Self> {
        config.fp8_block = None;
        let origin = Origin::random(&config, seed);
        Self::build(config, origin, backend, progress)
    }

    fn build(config: Config, origin: Origin<'_>, backend: B, progress: &mut dyn FnMut(usize, usize)) -> Result<Self> {
        backend.prepare(&config)?;
        let weights = Weights { origin, config: &config };
        let (vocab, d) = (config.vocab_size, config.hidden_size);
        let norm = |name: &str| backend.load_norm(&config, weights.vector(&format!("{name}.weight"), d)?);
        let embedding = backend.load_table(&weights.matrix("model.embed_tokens.weight", [vocab, d])?)?;
        let final_norm = norm("model.norm")?;
        let head = if config.tie_word_embeddings && !weights.untied_head()? {
            None
        } else {
            Some(backend.load_table(&weights.matrix("lm_head.weight", [vocab, d])?)?)
        };
        let count = config.layers.len();
        let mut blocks = Vec::with_capacity(count);
        for layer in 0..count {
            progress(layer, count);
            blocks.push(Block {
                attention_norm: norm(&format!("model.layers.{layer}.input_layernorm"))?,
                attention: backend.load_attention(&config, weights.attention(layer)?)?,
                feed_forward_norm: norm(&format!("model.layers.{layer}.post_attention_layernorm"))?,
                feed_forward: backend.load_feed_forward(&config, weights.feed_forward(layer)?)?,
            });
        }
        backend.loaded()?;
        progress(count, count);
        Ok(Self { config, backend, embedding, blocks, norm: final_norm, head })
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where it runs.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// A cache of so many blocks of [`BLOCK_SIZE`](crate::BLOCK_SIZE) tokens, which sequences share as their tables say.
    ///
    /// # Errors
    /// If there is not enough memory.
    pub fn cache(&self, blocks: usize) -> Result<B::Cache> {
        self.backend.cache(&self.config, blocks)
    }

    /// Runs tokens through all layers: hidden states `[tokens, d]` after the final norm. Keys and values are appended to the
    /// cache; prefill and decoding differ only in the segments' lengths.
    ///
    /// # Errors
    /// If an id is not in the vocabulary, the segments do not add up to the ids, or a segment does not continue what its blocks hold,
    /// passes their end or the model's positions.
    pub fn forward(
        &self,
        batch: &Batch<'_>,
        cache: &mut B::Cache,
        observer: Option<&mut dyn Observer>,
    ) -> Result<B::Hidden> {
        self.forward_with(batch, cache, observer, &GivenRouting::new())
    }

    /// [`Model::forward`] with the experts of some layers given: to compare implementations whose routers break a near-tie
    /// differently, or to try another choice. Their weights are what the layer's own scores at these ids give.
    ///
    /// # Errors
    /// Those of [`Model::forward`], and [`Error::Input`] if a layer routes nothing or its ids are not `[tokens, K]` of its experts.
    pub fn forward_with(
        &self,
        batch: &Batch<'_>,
        cache: &mut B::Cache,
        mut observer: Option<&mut dyn Observer>,
        routing: &GivenRouting,
    ) -> Result<B::Hidden> {
        self.check(batch, routing)?;
        self.run(batch, cache, &mut observer, routing)?;
        let hidden = self.backend.hidden(&self.config, &self.norm, cache)?;
        if let Some(observer) = observer {
            observer.hidden(self.blocks.len(), self.backend.read(&self.config, &hidden)?);
        }
        Ok(hidden)
    }

    /// All blocks, up to the final norm, for what [`Model::check`] has passed.
    fn run(
        &self,
        batch: &Batch<'_>,
        cache: &mut B::Cache,
        observer: &mut Option<&mut dyn Observer>,
        routing: &GivenRouting,
    ) -> Result<()> {
        let (backend, config) = (&self.backend, &self.config);
        backend.embed(config, &self.embedding, batch, cache)?;
        if observer.is_none() && routing.is_empty() && backend.decode(config, &self.blocks, cache)? {
            return Ok(());
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            if let Some(observer) = observer.as_deref_mut() {
                observer.hidden(layer, backend.residual(config, cache)?);
            }
            backend.attention(config, &block.attention_norm, &block.attention, layer, cache)?;
            let mut routed = Routed { given: routing.get(&layer), wanted: observer.is_some(), taken: None };
            backend.feed_forward(config, &block.feed_forward_norm, &block.feed_forward, &mut routed, cache)?;
            if let (Some(observer), Some((ids, logits))) = (observer.as_deref_mut(), routed.taken) {
                observer.topk(layer, ids);
                observer.router_logits(layer, logits);
            }
        }
        Ok(())
    }

    /// Refuses ids that are not the model's, lengths that do not agree, and a given routing that is not its layer's.
    fn check(&self, batch: &Batch<'_>, routing: &GivenRouting) -> Result<()> {
        let config = &self.config;
        let tokens = batch.segments.iter().fold(0_usize, |sum, segment| sum.saturating_add(segment.len));
        if tokens != batch.ids.len() {
            return Err(Error::Input(format!("{} token ids were given for segments of {tokens}", batch.ids.len())));
        }
        let most = config.max_position_embeddings;
        let ends = batch.segments.iter().map(|segment| segment.position.saturating_add(segment.len));
        if let Some(end) = ends.max().filter(|end| *end > most) {
            return Err(Error::Input(format!("a sequence of {end} tokens is longer than the model's {most}")));
        }
        let vocab = config.vocab_size;
        if let Some(id) = batch.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::Input(format!("token id {id} is not in the vocabulary of {vocab}")));
        }
        for (layer, given) in routing {
            let routes = config.layers.get(*layer) == Some(&FeedForward::Moe);
            let Some(moe) = config.moe.as_ref().filter(|_| routes) else {
                return Err(Error::Input(format!("experts are given for layer {layer}, which routes nothing")));
            };
            let (topk, experts) = (moe.routing.topk(), moe.routing.num_experts());
            if given.topk != topk || given.ids.len() != tokens * topk {
                let (got, slots) = (given.ids.len(), given.topk);
                return Err(Error::Input(format!(
                    "{got} experts, {slots} a token, are given for layer {layer}, which has {tokens} tokens with {topk} each"
                )));
            }
            if let Some(id) = given.ids.iter().find(|id| **id >= experts as i32) {
                return Err(Error::Input(format!("expert {id} is given for layer {layer}, which has {experts}")));
            }
        }
        Ok(())
    }

    /// The LM head on some rows of hidden states: `[rows, vocab]`.
    ///
    /// # Errors
    /// If there is no such row.
    pub fn logits(&self, hidden: &B::Hidden, rows: &[usize]) -> Result<Vec<f32>> {
        self.backend.logits(&self.config, self.lm_head(), hidden, rows)
    }

    fn lm_head(&self) -> &B::Table {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// A model with a cache of its own: what an [`Engine`](crate::Engine) runs.
pub struct Session<'a, B: Backend = Cpu> {
    model: &'a Model<B>,
    cache: B::Cache,
}

impl<'a, B: Backend> Session<'a, B> {
    /// A session whose cache holds nothing yet.
    ///
    /// # Errors
    /// If the backend cannot make a cache.
    pub fn new(model: &'a Model<B>) -> Result<Self> {
        Ok(Self { model, cache: model.cache(0)? })
    }
}

impl<B: Backend> Session<'_, B> {
    /// A pass up to its end, which draws so or gives logits, and the last row of each segment.
    fn pass(&mut self, batch: &Batch<'_>, draws: &[Draw<'_>]) -> Result<Vec<usize>> {
        let (model, routing) = (self.model, GivenRouting::new());
        model.check(batch, &routing)?;
        if !model.backend.replay(batch, draws, &mut self.cache)? {
            model.run(batch, &mut self.cache, &mut None, &routing)?;
        }
        let ends = batch.segments.iter().scan(0, |end, segment| {
            *end += segment.len;
            Some(*end - 1)
        });
        Ok(ends.collect())
    }
}

impl<B: Backend> Forward for Session<'_, B> {
    fn vocab_size(&self) -> usize {
        self.model.config.vocab_size
    }

    fn max_position_embeddings(&self) -> usize {
        self.model.config.max_position_embeddings
    }

    fn reset(&mut self, blocks: usize) -> Result<()> {
        self.cache = self.model.cache(blocks)?;
        Ok(())
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<Vec<f32>> {
        let last = self.pass(batch, &[])?;
        let model = self.model;
        model.backend.last_logits(&model.config, &model.norm, model.lm_head(), &last, &mut self.cache)
    }

    fn sample(&mut self, batch: &Batch<'_>, draws: &[Draw<'_>]) -> Result<Vec<Result<u32>>> {
        if draws.len() != batch.segments.len() {
            let (got, segments) = (draws.len(), batch.segments.len());
            return Err(Error::Input(format!("{got} draws were given for {segments} segments: give one for each")));
        }
        let last = self.pass(batch, draws)?;
        let model = self.model;
        model.backend.last_tokens(&model.config, &model.norm, model.lm_head(), &last, draws, &mut self.cache)
    }
}
