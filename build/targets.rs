//! Which machine code each kernel is compiled to.

/// GPU architectures of a build.
#[derive(Debug, PartialEq)]
pub(crate) struct Targets {
    /// Only these capabilities, such as 80 or 90; all if empty.
    only: Vec<u32>,
}

impl Targets {
    /// Reads `CUDA_COMPUTE_CAP`: capabilities such as `90` or `80,90` (or `8.0`); unset or empty means all.
    pub(crate) fn from_env(value: Option<&str>) -> Result<Self, String> {
        let mut only = Vec::new();
        for word in value.unwrap_or_default().split([',', ';', ' ']).filter(|word| !word.is_empty()) {
            let capability = word.replace('.', "").parse().ok().filter(|capability| *capability >= 80);
            only.push(capability.ok_or_else(|| {
                format!("CUDA_COMPUTE_CAP must list capabilities of 80 or more, such as 90 or 80,90, got {word:?}")
            })?);
        }
        Ok(Self { only })
    }

    /// nvcc's `-gencode` arguments for a kernel file, by its name.
    ///
    /// `*_sm90.cu` holds Hopper's own instructions: code for 9.0 alone, nothing newer can run it. Every other file is
    /// portable: code for 8.0 and 9.0, and PTX of 8.0 from which the driver makes code for whatever is newer. Under
    /// `CUDA_COMPUTE_CAP` a portable file gets code for the named capabilities only, and PTX of the oldest of them.
    pub(crate) fn gencode(&self, file_name: &str) -> Vec<String> {
        if file_name.ends_with("_sm90.cu") {
            return vec!["-gencode=arch=compute_90a,code=sm_90a".to_owned()];
        }
        let capabilities = if self.only.is_empty() { &[80, 90][..] } else { &self.only };
        let oldest = capabilities.iter().min().copied().unwrap_or(80);
        let mut arguments: Vec<String> =
            capabilities.iter().map(|cap| format!("-gencode=arch=compute_{cap},code=sm_{cap}")).collect();
        arguments.push(format!("-gencode=arch=compute_{oldest},code=compute_{oldest}"));
        arguments
    }
}
