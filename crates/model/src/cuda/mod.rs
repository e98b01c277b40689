//! The GPU backend: anabranch's CUDA operations, weights and activations in bf16.
//!
//! A step launches and returns: it allocates nothing once its buffers are there ([`CudaCache`] keeps them), and waits for nothing, so that
//! decode steps become CUDA graphs as they are. What waits is what the host asks for: logits, tokens, hidden states, expert ids.

mod attention;
mod cache;
mod decode;
mod draws;
mod graphs;
mod layers;
mod load;
mod memory;
mod moe;
mod parts;
mod staging;
mod workspace;

pub use attention::CudaAttention;
pub use cache::CudaCache;
pub use layers::Norm as CudaNorm;
pub use memory::GpuUsage;
pub use moe::CudaFeedForward;

use anabranch::cuda::{
    CUBLASLT_FROM_TOKENS, Device, Epilogue, LinearInput, SampleInput, Stream, Tensor, Tile, View, argmax_into,
    argmax_workspace, embedding, embedding_into, linear, sample_into,
};
use half::bf16;

use self::{
    draws::{any_drawn, wants_logits},
    layers::Dense,
    load::{Axis, pad},
    memory::{Gpu, explain},
    workspace::Workspace,
};
use crate::{
    Backend, Batch, Block, Config, Draw, Error, Result,
    backend::{Routed, check_row, draw_rows},
    weights::{AttentionWeights, FeedForwardWeights, StoredLinear},
};

/// A GPU that models run on. Weights are held in bf16 whatever the checkpoint stores, the residual stream is bf16, sums are float32.
#[derive(Debug)]
pub struct Cuda {
    gpu: Gpu,
}

/// Hidden states after the final norm, on the GPU.
#[derive(Debug)]
pub struct CudaHidden {
    /// `[tokens, d]`, d padded.
    values: Tensor<bf16>,
}

/// The embedding table or the LM head, `[vocab, d]`, both padded.
#[derive(Debug)]
pub struct CudaTable(Dense);

impl Cuda {
    /// Opens GPU number `ordinal`, counted from 0, with a stream of its own. Long dense products run on cuBLASLt where that is installed
    /// ([`Stream::enable_cublaslt`]), else on the kernels' own.
    ///
    /// # Errors
    /// [`anabranch::Error::NoGpu`] if there is none of that number, or its driver or architecture is too old;
    /// [`anabranch::Error::Setting`] if `ANABRANCH_CUBLASLT` names a library that cannot be loaded, [`anabranch::Error::OutOfMemory`].
    pub fn open(ordinal: usize) -> Result<Self> {
        let stream = Device::open(ordinal)?.new_stream()?;
        match stream.enable_cublaslt(CUBLASLT_FROM_TOKENS) {
            Ok(()) => {}
            Err(error @ anabranch::Error::NoCublasLt { .. }) => tracing::debug!("{error}"),
            Err(error) => return Err(error.into()),
        }
        Ok(Self::on(stream))
    }

    /// Runs on a stream that the caller has, with cuBLASLt if the caller has enabled it there.
    pub fn on(stream: Stream) -> Self {
        Self { gpu: Gpu::new(stream) }
    }

    /// The stream that everything runs on.
    pub fn stream(&self) -> &Stream {
        &self.gpu.stream
    }

    /// What models on this backend took of the GPU's memory.
    pub fn usage(&self) -> GpuUsage {
        self.gpu.usage()
    }
}

impl Backend for Cuda {
    type Hidden = CudaHidden;
    type Table = CudaTable;
    type Norm = CudaNorm;
    type Attention = CudaAttention;
    type FeedForward = CudaFeedForward;
    type Cache = CudaCache;

    fn prepare(&self, config: &Config) -> Result<()> {
        attention::check(config)?;
        let parameters = config.parameters_unbounded();
        let needed = u64::try_from(2 * parameters).unwrap_or(u64::MAX);
        let free = self.gpu.free()?;
        if needed > free {
            let what = format!("a model of {:.1} billion parameters", parameters as f64 / 1e9);
            let advice = format!("{:.1} billion would fit in bf16", free as f64 / 2e9);
            return Err(Error::GpuMemory { what, needed, free, advice });
        }
        Ok(())
    }

    fn loaded(&self) -> Result<()> {
        self.gpu.stream.synchronize()?;
        self.gpu.staging().clear();
        Ok(())
    }

    fn load_table(&self, weights: &StoredLinear) -> Result<CudaTable> {
        let [vocab, d] = weights.shape()?;
        Ok(CudaTable(Dense::load(&self.gpu, weights, Axis::whole(vocab), Axis::whole(d))?))
    }

    fn load_norm(&self, config: &Config, weight: Vec<f32>) -> Result<CudaNorm> {
        CudaNorm::load(&self.gpu, &weight, Axis::whole(weight.len()), config.rms_norm_eps)
    }

    fn load_attention(&self, config: &Config, weights: AttentionWeights) -> Result<CudaAttention> {
        CudaAttention::load(&self.gpu, config, &weights)
    }

    fn load_feed_forward(&self, config: &Config, weights: FeedForwardWeights) -> Result<CudaFeedForward> {
        CudaFeedForward::load(&self.gpu, config, &weights)
    }

    fn cache(&self, config: &Config, blocks: usize) -> Result<CudaCache> {
        CudaCache::new(&self.gpu, config, blocks)
    }

    fn embed(&self, config: &Config, table: &CudaTable, batch: &Batch<'_>, cache: &mut CudaCache) -> Result<()> {
        if !cache.graphs.has_begun() {
            cache.begin(&self.gpu, batch)?;
        }
        let CudaCache { batch, work, .. } = cache;
        let x = &mut work.residual.begin().part_mut(0, [batch.tokens, pad(config.hidden_size)])?;
        Ok(embedding_into(&self.gpu.stream, &table.0.weight(), &batch.ids()?, x)?)
    }

    fn attention(
        &self,
        _: &Config,
        norm: &CudaNorm,
        weights: &CudaAttention,
        layer: usize,
        cache: &mut CudaCache,
    ) -> Result<()> {
        if cache.batch.tokens == 0 {
            return Ok(());
        }
        weights.run(&self.gpu, norm, layer, cache)?;
        cache.work.residual.added();
        Ok(())
    }

    fn feed_forward(
        &self,
        _: &Config,
        norm: &CudaNorm,
        weights: &CudaFeedForward,
        routing: &mut Routed<'_>,
        cache: &mut CudaCache,
    ) -> Result<()> {
        if cache.batch.tokens == 0 {
            return Ok(());
        }
        weights.run(&self.gpu, norm, routing, cache)?;
        cache.work.residual.added();
        Ok(())
    }

    fn decode(&self, _: &Config, blocks: &[Block<Self>], cache: &mut CudaCache) -> Result<bool> {
        decode::run(&self.gpu, blocks, cache)
    }

    fn residual(&self, config: &Config, cache: &mut CudaCache) -> Result<Vec<f32>> {
        let x = cache.work.residual(&self.gpu, cache.batch.tokens)?;
        self.download(&x, config.hidden_size)
    }

    fn hidden(&self, config: &Config, norm: &CudaNorm, cache: &mut CudaCache) -> Result<CudaHidden> {
        let CudaCache { batch, work, .. } = cache;
        let shape = [batch.tokens, pad(config.hidden_size)];
        let what = || format!("hidden states of {} tokens", shape[0]);
        let fit = |free: u64| format!("{} tokens at a time would fit", free / (2 * shape[1] as u64));
        let mut values = self.gpu.stream.zeros(shape).map_err(|error| explain(error.into(), what, fit))?;
        norm.run(&self.gpu.stream, &work.residual(&self.gpu, batch.tokens)?, &mut values.view_mut())?;
        Ok(CudaHidden { values })
    }

    fn read(&self, config: &Config, hidden: &CudaHidden) -> Result<Vec<f32>> {
        self.download(&hidden.values.view(), config.hidden_size)
    }

    fn logits(&self, config: &Config, head: &CudaTable, hidden: &CudaHidden, rows: &[usize]) -> Result<Vec<f32>> {
        let stream = &self.gpu.stream;
        let rows = row_numbers(rows, hidden.values.shape().sizes()[0])?;
        let rows = stream.upload([rows.len()], &rows)?;
        let x = embedding(stream, &hidden.values.view(), &rows.view())?;
        let weight = head.0.weight();
        let input = LinearInput { x: x.view(), weight, bias: None, epilogue: Epilogue::Linear, tile: Tile::Auto };
        let logits = linear(stream, &input)?;
        self.download_f32(&logits.view(), config.vocab_size)
    }

    fn last_logits(
        &self,
        config: &Config,
        norm: &CudaNorm,
        head: &CudaTable,
        rows: &[usize],
        cache: &mut CudaCache,
    ) -> Result<Vec<f32>> {
        self.finish(config, norm, head, rows, &[], cache)?;
        self.download_f32(&cache.work.logits.part(0, [rows.len(), head.0.out()])?, config.vocab_size)
    }

    fn last_tokens(
        &self,
        config: &Config,
        norm: &CudaNorm,
        head: &CudaTable,
        rows: &[usize],
        draws: &[Draw<'_>],
        cache: &mut CudaCache,
    ) -> Result<Vec<Result<u32>>> {
        let vocab = config.vocab_size;
        if head.0.out() != vocab {
            // What pads a row may be its largest.
            return draw_rows(&self.last_logits(config, norm, head, rows, cache)?, vocab, draws);
        }
        self.finish(config, norm, head, rows, draws, cache)?;
        let (stream, work) = (&self.gpu.stream, &cache.work);
        let tokens = stream.download(&work.tokens.part(0, [rows.len()])?)?;
        let refused = || {
            Error::Input(
                "logits hold NaN or plus infinity, or nothing but minus infinity: there is no token to draw".to_owned(),
            )
        };
        let token = |(row, (token, draw)): (usize, (i32, &Draw<'_>))| {
            if wants_logits(draw) {
                let logits = stream.download(&work.logits.part(row * vocab, [vocab])?)?;
                return Ok(draw.token(&logits));
            }
            Ok(u32::try_from(token).map_err(|_| refused()))
        };
        tokens.into_iter().zip(draws).enumerate().map(token).collect()
    }

    fn replay(&self, batch: &Batch<'_>, draws: &[Draw<'_>], cache: &mut CudaCache) -> Result<bool> {
        cache.replay(&self.gpu, batch, draws)
    }
}

impl Cuda {
    /// Ends a pass: logits of some rows, and the tokens that are drawn from them or the most probable ones, in the workspace.
    fn finish(
        &self,
        config: &Config,
        norm: &CudaNorm,
        head: &CudaTable,
        rows: &[usize],
        draws: &[Draw<'_>],
        cache: &mut CudaCache,
    ) -> Result<()> {
        if cache.graphs.replayed() {
            return Ok(());
        }
        let CudaCache { graphs, batch, work, .. } = cache;
        let (gpu, stream) = (&self.gpu, &self.gpu.stream);
        let (width, vocab, count) = (pad(config.hidden_size), head.0.out(), rows.len());
        let rows = row_numbers(rows, batch.tokens)?;
        let bytes = argmax_workspace(count, vocab)?;
        gpu.reserve(&mut work.logits, count * vocab)?;
        gpu.reserve(&mut work.tokens, count)?;
        gpu.reserve(&mut work.bytes, bytes)?;
        // Decode steps want every row.
        let all = count == batch.tokens && rows.iter().enumerate().all(|(index, row)| index == *row as usize);
        let shape = [count, vocab];
        if all {
            let Workspace { residual, normed, logits, .. } = &mut *work;
            residual.norm_product(stream, norm, &head.0, normed, count, &mut logits.part_mut(0, shape)?)?;
        } else {
            work.norm(gpu, norm, batch.tokens)?;
            gpu.reserve(&mut work.rows, count)?;
            gpu.reserve(&mut work.picked, count * width)?;
            stream.upload_into(&rows, &mut work.rows.part_mut(0, [count])?)?;
            let x = work.normed.part(0, [batch.tokens, width])?;
            let picked = &mut work.picked.part_mut(0, [count, width])?;
            embedding_into(stream, &x, &work.rows.part(0, [count])?, picked)?;
            head.0.run(stream, work.picked.part(0, [count, width])?, &mut work.logits.part_mut(0, shape)?)?;
        }
        if !graphs.recording() {
            work.draws.set(gpu, draws)?;
        }
        let (logits, tokens) = (work.logits.part(0, shape)?, &mut work.tokens.part_mut(0, [count])?);
        if any_drawn(draws) {
            let mut input = SampleInput { logits, rows: work.draws.rows(count)?, seen: None };
            sample_into(stream, &mut input, tokens)?;
        } else {
            // Whether logits or tokens are asked for, a recorded step serves both.
            argmax_into(stream, &logits, &mut work.bytes.view_mut(), tokens)?;
        }
        graphs.finish()
    }

    /// The first `width` columns as float32.
    fn download(&self, x: &View<'_, bf16>, width: usize) -> Result<Vec<f32>> {
        let values: Vec<f32> = self.gpu.stream.download(x)?.into_iter().map(bf16::to_f32).collect();
        Ok(narrow(values, x.shape().sizes()[1], width))
    }

    fn download_f32(&self, x: &View<'_, f32>, width: usize) -> Result<Vec<f32>> {
        Ok(narrow(self.gpu.stream.download(x)?, x.shape().sizes()[1], width))
    }
}

/// Rows without the padding at their end.
fn narrow(values: Vec<f32>, pitch: usize, width: usize) -> Vec<f32> {
    if pitch == width {
        return values;
    }
    values.chunks_exact(pitch).flat_map(|row| &row[..width]).copied().collect()
}

/// Rows as the GPU reads them, each one of `count`.
fn row_numbers(rows: &[usize], count: usize) -> Result<Vec<u32>> {
    rows.iter().map(|row| check_row(*row, count).map(|()| *row as u32)).collect()
}
