//! Published configurations, in the files of `configs/`: read as any `config.json` is.

/// Names and files.
macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!("../../../configs/", $name, ".json")))),*]
    };
}

const PRESETS: &[(&str, &str)] = presets![
    "deepseek-moe-2b",
    "deepseek-moe-16b",
    "deepseek-moe-142b",
    "deepseek-moe-145b",
    "deepseek-v2",
    "deepseek-v2-lite",
    "deepseek-v3",
    "glm-4.5-air",
    "kimi-k2",
    "llama-2-7b",
    "mixtral-8x7b",
    "olmoe-1b-7b",
    "qwen1.5-moe-a2.7b",
    "qwen3-30b-a3b",
];

/// The presets' names.
pub fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|&(name, _)| name)
}

/// A preset's `config.json`, as `init` writes it; `None` if there is no such preset.
pub fn json(name: &str) -> Option<&'static str> {
    PRESETS.iter().find(|&&(preset, _)| preset == name).map(|&(_, text)| text)
}
