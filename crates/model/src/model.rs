//! A model: weights on a backend, and the forward pass, written once for every family.

use std::path::Path;

use crate::{
    Backend, Batch, Checkpoint, Config, Cpu, Error, Forward, Result,
    backend::{Positions, TopkIds},
    weights::Weights,
};

/// Sees what a forward pass computes on its way.
pub trait Observer {
    /// Hidden states `[tokens, d]`: the embedding at 0, then the residual stream after each block; the last one, at the number of
    /// blocks, after the final norm (as Transformers gives them).
    fn hidden(&mut self, index: usize, values: Vec<f32>);
    /// The experts that layer `layer`'s router chose.
    fn topk(&mut self, layer: usize, ids: TopkIds);
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

/// norm, attention, norm, feed-forward, each pair added to the residual stream.
struct Block<B: Backend> {
    attention_norm: B::Norm,
    attention: B::Attention,
    feed_forward_norm: B::Norm,
    feed_forward: B::FeedForward,
}

impl<B: Backend> Model<B> {
    /// Loads a checkpoint folder in the Hugging Face layout. `progress` is told how many of how many blocks are loaded.
    ///
    /// # Errors
    /// If the configuration or a weight is missing, malformed or of another shape, naming the file and what was expected.
    pub fn load(dir: &Path, backend: B, progress: &mut dyn FnMut(usize, usize)) -> Result<Self> {
        let config = Config::from_dir(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let weights = Weights { checkpoint: &checkpoint, config: &config };
        let (vocab, d) = (config.vocab_size, config.hidden_size);
        let embedding = backend.load_table(&weights.matrix("model.embed_tokens.weight", [vocab, d])?)?;
        let norm = backend.load_norm(weights.vector("model.norm.weight", d)?)?;
        let head = if config.tie_word_embeddings {
            None
        } else {
            Some(backend.load_table(&weights.matrix("lm_head.weight", [vocab, d])?)?)
        };
        let count = config.layers.len();
        let mut blocks = Vec::with_capacity(count);
        for layer in 0..count {
            progress(layer, count);
            let norm = |name: &str| {
                let name = format!("model.layers.{layer}.{name}.weight");
                weights.vector(&name, d).and_then(|weight| backend.load_norm(weight))
            };
            blocks.push(Block {
                attention_norm: norm("input_layernorm")?,
                attention: backend.load_attention(&config, weights.attention(layer)?)?,
                feed_forward_norm: norm("post_attention_layernorm")?,
                feed_forward: backend.load_feed_forward(&config, weights.feed_forward(layer)?)?,
            });
        }
        progress(count, count);
        tracing::info!(
            model_type = config.model_type,
            blocks = count,
            bytes = checkpoint.total_bytes(),
            "loaded {}",
            dir.display()
        );
        Ok(Self { config, backend, embedding, blocks, norm, head })
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// A cache with one slot for each sequence; slot `i` holds `capacities[i]` tokens.
    ///
    /// # Errors
    /// If a capacity is beyond the model's longest sequence, or there is not enough memory.
    pub fn cache(&self, capacities: &[usize]) -> Result<B::Cache> {
        let most = self.config.max_position_embeddings;
        if let Some(capacity) = capacities.iter().find(|capacity| **capacity > most) {
            return Err(Error::Input(format!("a sequence of {capacity} tokens is longer than the model's {most}")));
        }
        self.backend.cache(&self.config, capacities)
    }

    /// Runs tokens through all blocks: hidden states `[tokens, d]` after the final norm. Keys and values are appended to the
    /// cache; prefill and decoding differ only in the segments' lengths.
    ///
    /// # Errors
    /// If an id is not in the vocabulary, the segments do not add up to the ids, or a segment does not continue its slot.
    pub fn forward(
        &self,
        batch: &Batch<'_>,
        cache: &mut B::Cache,
        mut observer: Option<&mut dyn Observer>,
    ) -> Result<B::Tensor> {
        let (backend, config) = (&self.backend, &self.config);
        let tokens: usize = batch.segments.iter().map(|segment| segment.len).sum();
        if tokens != batch.ids.len() {
            return Err(Error::Input(format!("{} token ids were given for segments of {tokens}", batch.ids.len())));
        }
        let vocab = config.vocab_size;
        if let Some(id) = batch.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::Input(format!("token id {id} is not in the vocabulary of {vocab}")));
        }
        let positions = Positions::new(&config.rope, batch.segments);
        let mut x = backend.embed(&self.embedding, batch.ids)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            if let Some(observer) = observer.as_deref_mut() {
                observer.hidden(layer, backend.read(&x)?);
            }
            let normed = backend.norm(config, &x, &block.attention_norm)?;
            let delta = backend.attention(config, &block.attention, &normed, layer, &positions, cache)?;
            backend.add(&mut x, &delta)?;
            let normed = backend.norm(config, &x, &block.feed_forward_norm)?;
            let (delta, ids) = backend.feed_forward(config, &block.feed_forward, &normed, observer.is_some())?;
            backend.add(&mut x, &delta)?;
            if let (Some(observer), Some(ids)) = (observer.as_deref_mut(), ids) {
                observer.topk(layer, ids);
            }
        }
        let x = backend.norm(config, &x, &self.norm)?;
        if let Some(observer) = observer {
            observer.hidden(self.blocks.len(), backend.read(&x)?);
        }
        Ok(x)
    }

    /// The LM head on some rows of hidden states: `[rows, vocab]`.
    ///
    /// # Errors
    /// If there is no such row.
    pub fn logits(&self, hidden: &B::Tensor, rows: &[usize]) -> Result<Vec<f32>> {
        self.backend.logits(self.head.as_ref().unwrap_or(&self.embedding), hidden, rows)
    }
}

/// A model with a cache of its own: what [`crate::generate`] runs.
pub struct Session<'a, B: Backend = Cpu> {
    model: &'a Model<B>,
    cache: B::Cache,
}

impl<'a, B: Backend> Session<'a, B> {
    /// A session without sequences.
    ///
    /// # Errors
    /// If the backend cannot make a cache.
    pub fn new(model: &'a Model<B>) -> Result<Self> {
        Ok(Self { model, cache: model.cache(&[])? })
    }
}

impl<B: Backend> Forward for Session<'_, B> {
    fn vocab_size(&self) -> usize {
        self.model.config.vocab_size
    }

    fn max_position_embeddings(&self) -> usize {
        self.model.config.max_position_embeddings
    }

    fn reset(&mut self, capacities: &[usize]) -> Result<()> {
        self.cache = self.model.cache(capacities)?;
        Ok(())
    }

    fn forward(&mut self, batch: &Batch<'_>) -> Result<Vec<f32>> {
        let hidden = self.model.forward(batch, &mut self.cache, None)?;
        let last: Vec<usize> = batch
            .segments
            .iter()
            .scan(0, |end, segment| {
                *end += segment.len;
                Some(*end - 1)
            })
            .collect();
        self.model.logits(&hidden, &last)
    }
}
