//! Decode steps as CUDA graphs. A step of as many sequences, up to as long a context, launches what the step before did, on the same
//! buffers: the first one runs as it comes, the second is recorded, and all others are one launch.

use anabranch::cuda::{Graph, Recording};

use super::{cache::CudaCache, draws::any_drawn, memory::Gpu};
use crate::{Batch, Draw, Result};

/// Steps of more sequences than this are not recorded: their launches take less time than their work.
pub(super) const MOST_SEQUENCES: usize = 256;
/// Graphs that are kept; the oldest make room.
const MOST_GRAPHS: usize = 32;

/// What makes two steps the same launches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    tokens: usize,
    max_kv_len: usize,
    /// Whether tokens are drawn on the GPU, where else the most probable are found. By what is in buffers.
    drawn: bool,
    /// The count of allocations: after another one, a buffer may be elsewhere.
    allocations: u64,
}

/// A cache's graphs, and the part that they have in the pass under way.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    pass: Pass,
    /// The step that was announced last, replayed ones aside: the next one like it is recorded.
    seen: Option<Key>,
    recorded: Vec<(Key, Graph)>,
    /// The stream cannot be recorded: the caller's may be CUDA's default one.
    refused: bool,
}

#[derive(Debug, Default)]
enum Pass {
    /// Launched step by step.
    #[default]
    Plain,
    /// Announced: its batch is on the GPU.
    Begun,
    /// On its way into a graph. Whatever ends the pass early ends the recording.
    Recorded(Key, Recording),
    Replayed,
}

impl Graphs {
    /// Whether the pass's steps have been launched as a graph.
    pub(super) fn replayed(&self) -> bool {
        matches!(self.pass, Pass::Replayed)
    }

    /// Whether what is launched now is recorded: copies from the host's memory cannot be, and are there already.
    pub(super) fn recording(&self) -> bool {
        matches!(self.pass, Pass::Recorded(..))
    }

    /// Whether the batch of the pass that begins is on the GPU already. A pass that was not announced is not recorded.
    pub(super) fn has_begun(&mut self) -> bool {
        match &self.pass {
            Pass::Recorded(..) => true,
            Pass::Begun => {
                self.pass = Pass::Plain;
                true
            }
            Pass::Plain | Pass::Replayed => {
                self.pass = Pass::Plain;
                false
            }
        }
    }

    /// Everything up to the pass's results is launched: what was recorded runs.
    pub(super) fn finish(&mut self) -> Result<()> {
        if let Pass::Recorded(key, recording) = std::mem::take(&mut self.pass) {
            // Where this fails, the pass may be tried again, and is not recorded then.
            self.refused = true;
            let graph = recording.finish()?;
            self.refused = false;
            graph.launch()?;
            if self.recorded.len() == MOST_GRAPHS {
                self.recorded.remove(0);
            }
            self.recorded.push((key, graph));
        }
        Ok(())
    }
}

impl CudaCache {
    /// Begins a pass that may be a recorded one: true if it is, and runs.
    pub(super) fn replay(&mut self, gpu: &Gpu, batch: &Batch<'_>, draws: &[Draw<'_>]) -> Result<bool> {
        // A recording that a failure left ends here.
        self.graphs.pass = Pass::Plain;
        let decodes = batch.segments.iter().all(|segment| segment.len == 1);
        if !decodes || batch.ids.is_empty() || batch.ids.len() > MOST_SEQUENCES {
            return Ok(false);
        }
        self.begin(gpu, batch)?;
        let (tokens, max_kv_len) = (self.batch.tokens, self.batch.all.max_kv_len);
        let key = Key { tokens, max_kv_len, drawn: any_drawn(draws), allocations: gpu.usage().allocations };
        let graphs = &mut self.graphs;
        graphs.recorded.retain(|(recorded, _)| recorded.allocations == key.allocations);
        let known = graphs.recorded.iter().find(|(recorded, _)| *recorded == key);
        let records = known.is_none() && graphs.seen == Some(key) && !graphs.refused;
        if known.is_some() || records {
            // A pass that is launched piece by piece brings them at its end.
            self.work.draws.set(gpu, draws)?;
        }
        if let Some((_, graph)) = known {
            graph.launch()?;
            graphs.pass = Pass::Replayed;
            return Ok(true);
        }
        graphs.pass = Pass::Begun;
        if records {
            match Recording::begin(&gpu.stream) {
                Ok(recording) => graphs.pass = Pass::Recorded(key, recording),
                Err(error) => {
                    tracing::info!("steps are launched kernel by kernel: {error}");
                    graphs.refused = true;
                }
            }
        }
        graphs.seen = Some(key);
        Ok(false)
    }
}
