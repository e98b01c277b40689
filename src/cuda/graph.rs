//! CUDA graphs: launches recorded once, and launched again as one.

use cudarc::driver::{
    CudaGraph,
    sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
};

use super::Stream;
use crate::{Error, Result};

const OPERATION: &str = "graph";

/// What is launched on a stream while this is there is recorded and does not run. Dropping it throws the record away.
///
/// Only launches may be recorded: what allocates, waits or copies from the host's memory fails, or makes the record useless.
#[derive(Debug)]
pub struct Recording {
    stream: Option<Stream>,
}

/// Recorded launches. They read and write the memory that they were recorded with, which must still be there.
#[derive(Debug)]
pub struct Graph {
    graph: Record,
    stream: Stream,
}

struct Record(CudaGraph);

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("..")
    }
}

impl Recording {
    /// Begins to record a stream. Kernels are loaded at their first launch, which cannot be recorded: launch everything once before.
    ///
    /// # Errors
    /// [`Error::Driver`] if the stream is recorded already.
    pub fn begin(stream: &Stream) -> Result<Self> {
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.cudarc().begin_capture(mode).map_err(|error| stream.driver(OPERATION, error))?;
        Ok(Self { stream: Some(stream.clone()) })
    }

    /// Ends the record.
    ///
    /// # Errors
    /// [`Error::Driver`] if something was called that cannot be recorded, or nothing was launched.
    pub fn finish(mut self) -> Result<Graph> {
        let nothing = || Error::Driver { operation: OPERATION, reason: "nothing was recorded".to_owned() };
        let stream = self.stream.take().ok_or_else(nothing)?;
        let graph = stream.cudarc().end_capture(CUgraphInstantiate_flags(0));
        let graph = graph.map_err(|error| stream.driver(OPERATION, error))?.ok_or_else(nothing)?;
        Ok(Graph { graph: Record(graph), stream })
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if let Some(stream) = &self.stream {
            // Whatever it says, the stream records no more.
            let _ = stream.cudarc().end_capture(CUgraphInstantiate_flags(0));
        }
    }
}

impl Graph {
    /// Launches everything that was recorded, on the stream that it was recorded on.
    ///
    /// # Errors
    /// [`Error::Driver`] if it cannot be launched, [`Error::Earlier`] if something before it failed.
    pub fn launch(&self) -> Result<()> {
        self.graph.0.launch().map_err(|error| self.stream.driver(OPERATION, error))?;
        self.stream.note(OPERATION);
        Ok(())
    }
}
