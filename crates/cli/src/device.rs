//! Where a model runs.

use crate::{failure::Failure, source::Source, units};
use anabranch::Dtype;
use anabranch_model::{Backend, Checkpoint, Config, Cpu, memory};
use std::str::FromStr;

/// The `--device` option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Device {
    /// The best that this build and machine have.
    Auto,
    /// The processor, in float32.
    Cpu,
    /// A GPU, by its number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", number)) if number.parse::<usize>().is_ok() => Ok(Self::Cuda(number.parse().unwrap_or(0))),
            _ => Err("expected auto, cpu, cuda or cuda:N".to_owned()),
        }
    }
}

/// What a run computes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Precision {
    F32,
    Bf16,
}

/// Where to run, as every command that runs a model asks.
#[derive(clap::Args)]
pub(crate) struct Where {
    /// Where to run: auto (a GPU if there is one), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: Device,
    /// What to compute in: the processor has f32, a GPU bf16 [default: what the device has]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
}

/// What a command does, on whatever device.
pub(crate) trait Task {
    fn on<P: Place>(self, place: P) -> Result<(), Failure>;
}

/// A backend, as the tool sees it.
pub(crate) trait Place: Backend {
    /// How keys and values are stored.
    const CACHED: Dtype;

    /// Bytes that weights take, wherever they come from.
    fn weight_bytes(source: &Source, config: &Config) -> Result<u64, Failure>;

    /// Bytes of a checkpoint that loading reads; `None` where they are only mapped, or there are none.
    fn bytes_read(source: &Source) -> Result<Option<u64>, Failure>;

    /// Bytes that can be taken; `None` where the backend itself refuses what does not fit.
    fn available() -> Option<u64>;

    /// What `--stats` says of memory.
    fn memory(&self) -> Result<Vec<[String; 2]>, Failure>;
}

impl Place for Cpu {
    const CACHED: Dtype = Dtype::F32;

    fn weight_bytes(source: &Source, _: &Config) -> Result<u64, Failure> {
        match source.folder() {
            Some(folder) => Ok(Checkpoint::open(folder)?.total_bytes()),
            None => Ok(0),
        }
    }

    fn bytes_read(_: &Source) -> Result<Option<u64>, Failure> {
        Ok(None)
    }

    fn available() -> Option<u64> {
        memory::available()
    }

    fn memory(&self) -> Result<Vec<[String; 2]>, Failure> {
        let peak = memory::peak_resident();
        Ok(peak.map(|peak| ["peak memory".to_owned(), units::bytes(peak)]).into_iter().collect())
    }
}

#[cfg(feature = "cuda")]
impl Place for anabranch_model::Cuda {
    const CACHED: Dtype = Dtype::Bf16;

    fn weight_bytes(_: &Source, config: &Config) -> Result<u64, Failure> {
        let parameters = anabranch_model::analysis::Analysis::new(config, 0, Dtype::Bf16).total_parameters;
        Ok(parameters.saturating_mul(2))
    }

    fn bytes_read(source: &Source) -> Result<Option<u64>, Failure> {
        Ok(source.folder().map(Checkpoint::open).transpose()?.map(|checkpoint| checkpoint.total_bytes()))
    }

    fn available() -> Option<u64> {
        None
    }

    fn memory(&self) -> Result<Vec<[String; 2]>, Failure> {
        let usage = self.usage();
        let row = |what: &str, bytes: u64| [what.to_owned(), units::bytes(bytes)];
        let mut rows =
            vec![row("weights", usage.weights), row("cache", usage.cache), row("workspace", usage.workspace)];
        if let Some(peak) = self.stream().device().peak_memory()? {
            rows.push(row("peak GPU memory", peak as u64));
        }
        Ok(rows)
    }
}

impl Where {
    /// Runs a task where it is to run.
    pub(crate) fn run(&self, task: impl Task) -> Result<(), Failure> {
        match (self.device, self.dtype) {
            // The processor is what computes in float32.
            (Device::Cpu, _) | (Device::Auto, Some(Precision::F32)) => self.on_processor(task),
            #[cfg(feature = "cuda")]
            (Device::Cuda(_), Some(Precision::F32)) => Err(Failure::Failed(
                "a GPU computes in bf16 only; leave out --dtype f32, or use --device cpu".to_owned(),
            )),
            #[cfg(feature = "cuda")]
            (Device::Cuda(ordinal), _) => task.on(anabranch_model::Cuda::open(ordinal)?),
            #[cfg(not(feature = "cuda"))]
            (Device::Cuda(_), _) => Err(Failure::Failed("this build has no CUDA support; use --device cpu".to_owned())),
            (Device::Auto, _) => self.anywhere(task),
        }
    }

    /// On a GPU that can be used, else on the processor.
    #[cfg(feature = "cuda")]
    fn anywhere(&self, task: impl Task) -> Result<(), Failure> {
        match anabranch_model::Cuda::open(0) {
            Ok(gpu) => task.on(gpu),
            Err(anabranch_model::Error::Operation(error @ anabranch::Error::NoGpu { .. })) => {
                tracing::info!("running on the processor: {error}");
                self.on_processor(task)
            }
            Err(error) => Err(error.into()),
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn anywhere(&self, task: impl Task) -> Result<(), Failure> {
        self.on_processor(task)
    }

    fn on_processor(&self, task: impl Task) -> Result<(), Failure> {
        if self.dtype == Some(Precision::Bf16) {
            return Err(Failure::Failed("the CPU computes in f32 only; leave out --dtype bf16".to_owned()));
        }
        task.on(Cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::Device;

    #[test]
    fn parses_devices() {
        assert_eq!("auto".parse(), Ok(Device::Auto));
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert_eq!("cuda".parse(), Ok(Device::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(Device::Cuda(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "CPU"] {
            assert!(wrong.parse::<Device>().is_err(), "{wrong}");
        }
    }
}
