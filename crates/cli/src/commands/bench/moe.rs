//! `anabranch bench moe`: the MoE layer, from router logits or hidden states to its output.

use super::{
    ceilings::Ceilings,
    logits::{LogitsFile, Spread},
    measure::{Bench, Setting},
    record::{self, Record},
    roofline,
    shapes::{Preset, Shape},
};
use crate::{commands::at_least_one, device::Device, failure::Failure, output};
use anabranch::cuda::Arch;
use std::path::PathBuf;

/// Measure the MoE layer, from router logits or hidden states to its output
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    anabranch bench moe --preset qwen3,mixtral\n  \
    anabranch bench moe --preset all --json results.json --plot roofline.svg --peers peers.json\n  \
    anabranch bench moe --hidden 2048 --intermediate 768 --experts 128 --topk 8 --tokens 1,37,1000 --routing zipf\n  \
    anabranch bench moe --preset qwen3 --steady\n\n\
    Every sample is one call between two CUDA events, after the second-level cache has been filled with other data: eager calls, \
    then graph launches, 50 to 200 of each in a tenth of a second or so, after half a second's rest (17 at least where a call takes \
    long). The smaller median counts. Weights are random, logits come from a fixed seed, the routing is the softmax over the top-k logits.\n\n\
    floor us = max(6 T K d n / 790e12, (experts hit * 6 d n + 4 T d) / 4.6e12); error is against the float32 reference on \
    sampled tokens.\n\n\
    --steady: sixteen layers with weights of their own (or as many as fit) in one graph, nothing flushed, time per layer.\n\n\
    RUST_LOG=info shows what is planned for every point.")]
pub(crate) struct Arguments {
    /// Published layers, in place of sizes
    #[arg(long, value_enum, value_name = "NAME,...", value_delimiter = ',', required_unless_present = "hidden",
          conflicts_with_all = ["hidden", "intermediate", "experts", "topk"])]
    preset: Vec<Preset>,
    /// Hidden size, d: a multiple of 8
    #[arg(long, value_name = "D", requires_all = ["intermediate", "experts", "topk"], value_parser = at_least_one)]
    hidden: Option<usize>,
    /// Width of an expert, n: a multiple of 8
    #[arg(long, value_name = "N", requires = "hidden", value_parser = at_least_one)]
    intermediate: Option<usize>,
    /// Number of routed experts, E
    #[arg(long, value_name = "E", requires = "hidden", value_parser = at_least_one)]
    experts: Option<usize>,
    /// Experts that a token visits, K
    #[arg(long, value_name = "K", requires = "hidden", value_parser = at_least_one)]
    topk: Option<usize>,
    /// Numbers of tokens, T [default: the preset's; else 1,8,64,512,4096,16384; with --steady 1,8,64]
    #[arg(long, value_name = "T,...", value_delimiter = ',', value_parser = at_least_one)]
    tokens: Vec<usize>,
    /// Shared experts of the same width beside the routed ones
    #[arg(long, value_name = "S", default_value_t = 0)]
    shared: usize,
    /// How tokens spread over experts
    #[arg(long, value_enum, default_value_t = Spread::Normal)]
    routing: Spread,
    /// Code path
    #[arg(long, value_enum, default_value_t = Path::Auto)]
    arch: Path,
    /// What the layer starts from: router logits, or hidden states and the router's gate
    #[arg(long, value_enum, default_value_t = From::Logits)]
    from: From,
    /// Logits from a safetensors file, NAME.T for a preset with T tokens [T, E]; made from the seed where it has none
    #[arg(long, value_name = "FILE", conflicts_with = "hidden")]
    logits: Option<PathBuf>,
    /// Samples of each kind of launch, exactly; published numbers of others have 20, which a GPU's power limit slows less than more
    #[arg(long, value_name = "N", conflicts_with = "steady", value_parser = at_least_one)]
    samples: Option<usize>,
    /// Measure sixteen layers back to back instead of one on its own
    #[arg(long)]
    steady: bool,
    /// Data type of weights and activations
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Write all points as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw all points beside the GPU's ceilings (measured for this) as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Points of others to draw, too, as benches/peers.py writes them
    #[arg(long, value_name = "FILE", requires = "plot")]
    peers: Option<PathBuf>,
    /// The GPU: cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cuda")]
    device: Device,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Path {
    /// The newest that GPU and shape allow
    Auto,
    /// mma.sync, for every GPU from compute capability 8.0 on
    Sm80,
    /// TMA and wgmma, for compute capability 9.0
    Sm90,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum From {
    Logits,
    Hidden,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Dtype {
    Bf16,
}

/// Decoding, small batches, prefill.
const TOKENS: [usize; 6] = [1, 8, 64, 512, 4096, 16_384];
const STEADY_TOKENS: [usize; 3] = [1, 8, 64];

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shapes = shapes(arguments);
    // Wrong sizes and files are found before anything is measured.
    shapes.iter().try_for_each(|shape| shape.routing().map(drop))?;
    if arguments.from == From::Hidden && (arguments.routing != Spread::Normal || arguments.logits.is_some()) {
        let message = "--from hidden makes its own logits; leave out --routing and --logits";
        return Err(Failure::Failed(message.to_owned()));
    }
    let logits = arguments.logits.as_deref().map(LogitsFile::open).transpose()?;
    let peers = arguments.peers.as_deref().map(record::read_peers).transpose()?;
    let ordinal = match arguments.device {
        Device::Cuda(ordinal) => ordinal,
        Device::Auto => 0,
        Device::Cpu => return Err(Failure::Failed("there is nothing to measure on the processor".to_owned())),
    };
    let setting = Setting {
        arch: match arguments.arch {
            Path::Auto => Arch::Auto,
            Path::Sm80 => Arch::Sm80,
            Path::Sm90 => Arch::Sm90,
        },
        num_shared: arguments.shared,
        spread: arguments.routing,
        from_hidden: arguments.from == From::Hidden,
        logits: logits.as_ref(),
        steady: arguments.steady,
    };
    let Dtype::Bf16 = arguments.dtype;
    let mut bench = Bench::open(ordinal, arguments.samples)?;
    output::print(&format!("{}\n", bench.device))?;

    let mut records: Vec<Record> = Vec::new();
    for shape in &shapes {
        let first = records.len();
        bench.shape(shape, &setting, |record| {
            records.push(record);
            arguments.json.as_deref().map_or(Ok(()), |path| output::json(path, &records))
        })?;
        output::print(&format!("\n{}\n{}", title(shape, arguments), record::table(&records[first..])))?;
    }
    if let Some(path) = &arguments.plot {
        let ceilings = Ceilings::measure(&bench, setting.arch)?;
        let Ceilings { read, copy, gemm } = ceilings;
        output::print(&format!("\nceilings: read {read:.2} TB/s, copy {copy:.2} TB/s, own GEMM {gemm:.0} TFLOP/s\n"))?;
        output::file(path, &roofline::draw(&records, peers.as_deref().unwrap_or_default(), ceilings))?;
    }
    Ok(())
}

/// The shapes to measure, with their tokens.
fn shapes(arguments: &Arguments) -> Vec<Shape> {
    let given = |hidden: usize| Shape {
        name: "custom".to_owned(),
        hidden,
        intermediate: arguments.intermediate.unwrap_or_default(),
        experts: arguments.experts.unwrap_or_default(),
        topk: arguments.topk.unwrap_or_default(),
        tokens: TOKENS.to_vec(),
    };
    let mut shapes: Vec<Shape> = arguments.hidden.map(given).into_iter().collect();
    shapes.extend(arguments.preset.iter().flat_map(|preset| preset.shapes()));
    for shape in &mut shapes {
        if !arguments.tokens.is_empty() {
            shape.tokens.clone_from(&arguments.tokens);
        } else if arguments.steady {
            shape.tokens = STEADY_TOKENS.to_vec();
        }
    }
    shapes
}

fn title(shape: &Shape, arguments: &Arguments) -> String {
    let Shape { name, hidden, intermediate, experts, topk, .. } = shape;
    let shared = if arguments.shared > 0 { format!(" and {} shared", arguments.shared) } else { String::new() };
    let from = if arguments.from == From::Hidden { "from hidden states" } else { "from logits" };
    let routing = arguments.routing.name();
    let steady = if arguments.steady { ", sixteen layers, time of one" } else { "" };
    format!(
        "{name}: {topk} of {experts} experts{shared}, hidden {hidden}, width {intermediate}; {routing} routing, {from}{steady}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn parsed(line: &str) -> Result<Arguments, String> {
        let words = std::iter::once("bench").chain(line.split_whitespace());
        Command::try_parse_from(words).map(|command| command.arguments).map_err(|error| error.to_string())
    }

    #[test]
    fn presets_bring_their_tokens() {
        let all = shapes(&parsed("--preset all").unwrap());
        assert_eq!(all.iter().map(|shape| shape.tokens.len()).sum::<usize>(), 26);
        let some = shapes(&parsed("--preset qwen3,sonic7b --tokens 3,37").unwrap());
        assert_eq!(some.iter().map(|shape| shape.name.as_str()).collect::<Vec<_>>(), ["qwen3", "sonic7b"]);
        assert!(some.iter().all(|shape| shape.tokens == [3, 37]));
        assert_eq!(shapes(&parsed("--preset sonic4k --steady").unwrap())[0].tokens, STEADY_TOKENS);
    }

    #[test]
    fn sizes_come_together() {
        let shape = &shapes(&parsed("--hidden 64 --intermediate 32 --experts 60 --topk 4").unwrap())[0];
        assert_eq!((shape.hidden, shape.intermediate, shape.experts, shape.topk), (64, 32, 60, 4));
        assert_eq!(shape.tokens, TOKENS);
        for wrong in [
            "",
            "--hidden 64",
            "--hidden 64 --intermediate 32 --experts 60",
            "--topk 4",
            "--preset qwen3 --hidden 64 --intermediate 32 --experts 60 --topk 4",
            "--preset qwen4",
            "--preset qwen3 --tokens 0",
            "--preset qwen3 --peers p.json",
            "--preset qwen3 --dtype fp8",
            "--hidden 64 --intermediate 32 --experts 60 --topk 4 --logits l.safetensors",
        ] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
