//! Time on the GPU, and noise to spend it on.

use std::time::Duration;

use anabranch::cuda::{
    Stream,
    cudarc::driver::{
        CudaGraph,
        sys::{CUdevice_attribute, CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode},
    },
};

/// Fewest launches in a graph: its own start is spread over them.
const LAUNCHES: usize = 20;
/// Most sets of buffers, where a set is so small that no number of them fills the cache.
const MOST_SETS: usize = 64;

/// How many sets of buffers of `bytes` each are twice the second-level cache.
pub(crate) fn sets(stream: &Stream, bytes: usize) -> usize {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
    let cache = stream.device().context().attribute(attribute).unwrap() as usize;
    (2 * cache).div_ceil(bytes).clamp(2, MOST_SETS)
}

/// A graph of launches: `launch(i)` is called for i from 0 to `sets`, over and over.
pub(crate) struct Launches {
    graph: CudaGraph,
    count: usize,
}

impl Launches {
    pub(crate) fn capture(stream: &Stream, sets: usize, mut launch: impl FnMut(usize)) -> Self {
        let count = LAUNCHES.next_multiple_of(sets);
        // Once outside of the graph: kernels are loaded at their first launch.
        (0..sets).for_each(&mut launch);
        stream.synchronize().unwrap();
        stream.cudarc().begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        (0..count).map(|i| i % sets).for_each(&mut launch);
        let graph = stream.cudarc().end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
        Self { graph, count }
    }

    /// Time of `iterations` launches, for criterion's `iter_custom`.
    pub(crate) fn time(&self, stream: &Stream, iterations: u64) -> Duration {
        let replays = iterations.div_ceil(self.count as u64);
        let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let start = stream.cudarc().record_event(timed).unwrap();
        for _ in 0..replays {
            self.graph.launch().unwrap();
        }
        let end = stream.cudarc().record_event(timed).unwrap();
        let milliseconds = f64::from(start.elapsed_ms(&end).unwrap());
        Duration::from_secs_f64(milliseconds * 1e-3 * iterations as f64 / (replays * self.count as u64) as f64)
    }
}

/// Reproducible noise, always the same (xorshift).
pub(crate) struct Noise(u64);

impl Default for Noise {
    fn default() -> Self {
        Self(0x2545_f491_4f6c_dd1d)
    }
}

impl Noise {
    /// In (0, 1).
    pub(crate) fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 40) as f32 + 0.5) / (1_u64 << 24) as f32
    }

    /// Standard normal (Box-Muller).
    pub(crate) fn normal(&mut self) -> f32 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f32::consts::TAU * self.uniform()).cos()
    }
}
