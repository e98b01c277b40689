//! Where a model runs.

use crate::failure::Failure;
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

impl Device {
    /// Refuses what this build cannot run on.
    pub(crate) fn check(self) -> Result<(), Failure> {
        match self {
            Self::Auto | Self::Cpu => Ok(()),
            Self::Cuda(_) => Err(Failure::Failed("this build has no CUDA support; use --device cpu".to_owned())),
        }
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
