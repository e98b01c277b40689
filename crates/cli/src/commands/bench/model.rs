//! `anabranch bench model`: whole models of random weights, decoding and reading prompts.

use super::bars;
use crate::{commands::at_least_one, device::Device, failure::Failure, output, progress, source::configuration, units};
use anabranch::Dtype;
use anabranch_model::{
    BLOCK_SIZE, Batch, Config, Cuda, Draw, Forward, Model, Segment, Session, analysis::Analysis, blocks_for,
};
use serde::Serialize;
use std::{path::PathBuf, time::Instant};

/// Measure whole models with random weights: decoding, and reading prompts
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    anabranch bench model --config qwen3-30b-a3b\n  \
    anabranch bench model --config deepseek-moe-16b,llama-2-7b --batch 1,8,64 --context 128,1024 --json model.json --plot model.svg\n\n\
    Decoding: every sequence has so many tokens in the cache, and the median time of a step that adds one to each counts, as the \
    program that asked for it sees it: numbers to the GPU, the step, the most probable tokens back.\n\n\
    floor: bytes of the weights that a step must read, over 4.6 TB/s: all but the embedding table and the experts that nobody visits. \
    With several sequences E (1 - (1 - K / E)^B) of a layer's E experts are expected to be visited. with cache: the share where \
    the sequences' keys and values, which a step must read, too, count as well.\n\n\
    Prefill: one prompt of so many random tokens, in one pass.")]
pub(crate) struct Arguments {
    /// Published configurations by name, or config.json files or the folders that hold them
    #[arg(long, value_name = "NAME|FILE,...", value_delimiter = ',', required = true)]
    config: Vec<String>,
    /// Sequences that decode side by side
    #[arg(long, value_name = "B,...", value_delimiter = ',', default_value = "1", value_parser = at_least_one)]
    batch: Vec<usize>,
    /// Tokens that each of them has in the cache
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "128,1024", value_parser = at_least_one)]
    context: Vec<usize>,
    /// Tokens of a prompt whose reading is measured
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = at_least_one)]
    prefill: Vec<usize>,
    /// Write all points as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw decoding beside the floors as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// The GPU: cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cuda")]
    device: Device,
}

/// Bytes a second that the floor is computed with: what an H200 reads at best.
const BYTES: f64 = 4.6e12;
/// Steps before those that count: the first ones are launched one by one and recorded.
const WARM: usize = 8;
const STEPS: usize = 64;
/// Passes of a prompt that count, after one that does not.
const PASSES: usize = 5;
/// Tokens of a pass that only fills the cache.
const PIECE: usize = 4096;

/// One point, as it stands in JSON.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Point {
    pub(super) model: String,
    /// `decode` or `prefill`.
    pub(super) phase: &'static str,
    pub(super) batch: usize,
    /// Tokens in the cache of each sequence, or of the prompt.
    pub(super) context: usize,
    pub(super) ms_median: f64,
    pub(super) ms_min: f64,
    pub(super) tokens_per_second: f64,
    /// Of decoding.
    pub(super) floor_tokens_per_second: Option<f64>,
    /// Bytes of keys and values that a decoding step reads beside the weights.
    pub(super) cache_bytes: u64,
    pub(super) weight_bytes: u64,
    pub(super) peak_bytes: Option<u64>,
    pub(super) device: String,
}

impl Point {
    /// What a decoding step takes at least to read weights, keys and values, of what it takes.
    fn of_all_bytes(&self) -> f64 {
        (self.weight_bytes + self.cache_bytes) as f64 / BYTES / (self.ms_median / 1e3)
    }
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let ordinal = match arguments.device {
        Device::Cuda(ordinal) => ordinal,
        Device::Auto => 0,
        Device::Cpu => return Err(Failure::Failed("there is nothing to measure on the processor".to_owned())),
    };
    let mut configs = Vec::new();
    for name in &arguments.config {
        let (path, text) = configuration(name)?;
        let config = Config::from_json(&path, &text)?;
        let longest =
            arguments.context.iter().map(|context| context + WARM + STEPS).chain(arguments.prefill.iter().copied());
        if let Some(tokens) = longest.max().filter(|tokens| *tokens > config.max_position_embeddings) {
            return Err(Failure::Failed(format!(
                "{name} has {} positions, fewer than the {tokens} tokens of a sequence that is to be measured",
                config.max_position_embeddings
            )));
        }
        configs.push((name, config));
    }
    let mut points = Vec::new();
    for (name, config) in configs {
        let first = points.len();
        measure(arguments, ordinal, name, &config, &mut points)?;
        output::print(&format!("\n{name}\n{}", table(&points[first..])))?;
        if let Some(path) = &arguments.json {
            output::json(path, &points)?;
        }
    }
    match &arguments.plot {
        Some(path) => output::file(path, &bars::draw(&points)),
        None => Ok(()),
    }
}

fn measure(
    arguments: &Arguments,
    ordinal: usize,
    name: &str,
    config: &Config,
    points: &mut Vec<Point>,
) -> Result<(), Failure> {
    let gpu = Cuda::open(ordinal)?;
    let device = gpu.stream().device().name()?;
    let model = progress::loading(|report| Model::random(config.clone(), 0, gpu, report))?;
    let mut session = Session::new(&model)?;
    let mut add = |phase, batch: usize, context: usize, mut seconds: Vec<f64>| -> Result<(), Failure> {
        seconds.sort_by(f64::total_cmp);
        let (median, min) = (seconds[seconds.len() / 2], seconds[0]);
        let decodes = phase == "decode";
        let analysis = Analysis::new(config, context, Dtype::Bf16);
        let weight_bytes = visited(config, &analysis, batch);
        points.push(Point {
            model: name.to_owned(),
            phase,
            batch,
            context,
            ms_median: median * 1e3,
            ms_min: min * 1e3,
            tokens_per_second: if decodes { batch } else { context } as f64 / median,
            floor_tokens_per_second: decodes.then(|| batch as f64 * BYTES / weight_bytes),
            cache_bytes: batch as u64 * analysis.cache.bytes,
            weight_bytes: weight_bytes as u64,
            peak_bytes: model.backend().stream().device().peak_memory()?.map(|peak| peak as u64),
            device: device.clone(),
        });
        Ok(())
    };
    for &batch in &arguments.batch {
        for &context in &arguments.context {
            let seconds = decode(&mut session, batch, context)?;
            add("decode", batch, context, seconds)?;
        }
    }
    for &tokens in &arguments.prefill {
        let seconds = prefill(&mut session, tokens)?;
        add("prefill", 1, tokens, seconds)?;
    }
    Ok(())
}

/// Bytes of weights that a step of `batch` tokens must read.
fn visited(config: &Config, analysis: &Analysis, batch: usize) -> f64 {
    let active = analysis.active_parameters_without_embedding as f64;
    let Some(routing) = &analysis.routing else { return 2.0 * active };
    let (experts, topk) = (routing.num_experts as f64, routing.topk as f64);
    let expert = 3.0 * (config.hidden_size * routing.intermediate_size) as f64;
    let hit = if batch == 1 { topk } else { experts * (1.0 - (1.0 - topk / experts).powi(batch as i32)) };
    2.0 * (active + analysis.num_moe_layers as f64 * (hit - topk) * expert)
}

/// Token ids as random as they need be: the same every time.
fn ids(vocab_size: usize, count: usize) -> Vec<u32> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % vocab_size as u64) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Seconds of each step that adds a token to every sequence.
fn decode(session: &mut Session<'_, Cuda>, batch: usize, context: usize) -> Result<Vec<f64>, Failure> {
    let each = blocks_for(context + WARM + STEPS);
    session.reset(batch * each)?;
    let tables: Vec<Vec<u32>> = (0..batch)
        .map(|sequence| (sequence * each..(sequence + 1) * each).map(|block| block as u32).collect())
        .collect();
    // Each its own, or all would visit the same experts.
    let prompts = ids(session.vocab_size(), batch * context);
    let mut next = vec![0_u32; batch];
    for ((blocks, next), prompt) in tables.iter().zip(&mut next).zip(prompts.chunks_exact(context)) {
        for (piece, ids) in prompt.chunks(PIECE).enumerate() {
            let segments = [Segment { blocks, position: piece * PIECE, len: ids.len() }];
            *next = session.sample(&Batch { ids, segments: &segments }, &[Draw::greedy()])?.remove(0)?;
        }
    }
    let draws = vec![Draw::greedy(); batch];
    let mut seconds = Vec::with_capacity(STEPS);
    for step in 0..WARM + STEPS {
        let segments: Vec<Segment<'_>> =
            tables.iter().map(|blocks| Segment { blocks, position: context + step, len: 1 }).collect();
        let start = Instant::now();
        let drawn = session.sample(&Batch { ids: &next, segments: &segments }, &draws)?;
        if step >= WARM {
            seconds.push(start.elapsed().as_secs_f64());
        }
        next = drawn.into_iter().collect::<Result<_, _>>()?;
    }
    Ok(seconds)
}

/// Seconds of each pass over a prompt.
fn prefill(session: &mut Session<'_, Cuda>, tokens: usize) -> Result<Vec<f64>, Failure> {
    session.reset(tokens.div_ceil(BLOCK_SIZE))?;
    let blocks: Vec<u32> = (0..tokens.div_ceil(BLOCK_SIZE) as u32).collect();
    let prompt = ids(session.vocab_size(), tokens);
    let segments = [Segment { blocks: &blocks, position: 0, len: tokens }];
    let mut seconds = Vec::with_capacity(PASSES);
    for pass in 0..=PASSES {
        let start = Instant::now();
        session.sample(&Batch { ids: &prompt, segments: &segments }, &[Draw::greedy()])?;
        if pass > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

fn table(points: &[Point]) -> String {
    let head = ["", "batch", "context", "ms", "min", "tokens/s", "floor", "of it", "with cache", "peak"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(points.iter().map(|point| {
        let floor = point.floor_tokens_per_second;
        vec![
            point.phase.to_owned(),
            point.batch.to_string(),
            units::grouped(point.context as u64),
            format!("{:.3}", point.ms_median),
            format!("{:.3}", point.ms_min),
            format!("{:.0}", point.tokens_per_second),
            floor.map_or_else(|| "-".to_owned(), |floor| format!("{floor:.0}")),
            floor.map_or_else(|| "-".to_owned(), |floor| format!("{:.0}%", 100.0 * point.tokens_per_second / floor)),
            floor.map_or_else(|| "-".to_owned(), |_| format!("{:.0}%", 100.0 * point.of_all_bytes())),
            point.peak_bytes.map_or_else(|| "-".to_owned(), units::bytes),
        ]
    }));
    units::table(&rows, &[1, 2, 3, 4, 5, 6, 7, 8, 9])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the published floors: active weights without the embedding table over 4.6 TB/s.
    #[test]
    fn floors_are_the_published_ones() {
        for (name, floor) in [
            ("deepseek-moe-16b", 877.0),
            ("deepseek-v2-lite", 930.0),
            ("qwen3-30b-a3b", 760.0),
            ("mixtral-8x7b", 180.0),
            ("llama-2-7b", 348.0),
        ] {
            let config = Config::preset(name).unwrap().unwrap();
            let analysis = Analysis::new(&config, 128, Dtype::Bf16);
            let got = BYTES / visited(&config, &analysis, 1);
            assert!((got / floor - 1.0).abs() < 0.02, "{name}: {got}");
            // More sequences read more, and never more than everything.
            let all = 2.0 * analysis.total_parameters as f64;
            let many: Vec<f64> = [1, 8, 64, 4096].map(|batch| visited(&config, &analysis, batch)).to_vec();
            assert!(many.is_sorted() && many[3] <= all, "{name}");
        }
    }

    #[test]
    fn ids_are_in_the_vocabulary_and_differ() {
        let ids = ids(100, 1000);
        assert!(ids.iter().all(|id| *id < 100));
        let mut seen = ids.clone();
        seen.sort_unstable();
        seen.dedup();
        assert!(seen.len() > 90);
    }
}
