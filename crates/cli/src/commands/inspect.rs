//! `anabranch inspect`: what a configuration tells without weights.

use crate::{failure::Failure, output, units};
use anabranch::Dtype;
use anabranch_model::{
    Config,
    analysis::{Analysis, Comparison, PartSize, RoutingSummary},
};
use serde::Serialize;
use std::fmt::Write;

/// Show a model's architecture, sizes, compute and memory, from config.json alone
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    anabranch inspect --model deepseek-v3\n  \
    anabranch inspect --model DIR --json\n  \
    anabranch inspect --model deepseek-moe-16b --versus llama-2-7b\n\n\
    --versus compares compute by the formula of the DeepSeekMoE paper (arXiv 2401.06066): forward and backward pass,\n\
    attention not causal, router and norms not counted.")]
pub(crate) struct Arguments {
    /// Folder with config.json, the file itself, or the name of a published configuration
    #[arg(long, value_name = "DIR|PRESET")]
    model: String,
    /// Another model to compare with
    #[arg(long, value_name = "DIR|PRESET")]
    versus: Option<String>,
    /// Tokens of the sequence that compute and memory are given for [default: 4096, or the model's most]
    #[arg(long, value_name = "N", value_parser = super::at_least_one)]
    context: Option<usize>,
    /// Data type of the KV cache
    #[arg(long, value_enum, default_value_t = CacheDtype::Bf16)]
    cache_dtype: CacheDtype,
    /// Print JSON, whose keys stay as they are
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum CacheDtype {
    F32,
    Bf16,
    F16,
}

/// The sequence of the paper's tables.
const CONTEXT: usize = 4096;

#[derive(Serialize)]
struct Report {
    name: String,
    #[serde(flatten)]
    analysis: Analysis,
}

#[derive(Serialize)]
struct Reports {
    #[serde(flatten)]
    model: Report,
    #[serde(flatten)]
    against: Option<Against>,
}

#[derive(Serialize)]
struct Against {
    versus: Report,
    comparison: Comparison,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let config = Config::load(&arguments.model)?;
    let versus = arguments.versus.as_deref().map(|name| Ok::<_, Failure>((name, Config::load(name)?))).transpose()?;
    let limits = [Some(&config), versus.as_ref().map(|(_, config)| config)];
    let most = limits.into_iter().flatten().map(|config| config.max_position_embeddings).min();
    let context = arguments.context.unwrap_or_else(|| CONTEXT.min(most.unwrap_or(CONTEXT)));
    let cache_dtype = match arguments.cache_dtype {
        CacheDtype::F32 => Dtype::F32,
        CacheDtype::Bf16 => Dtype::Bf16,
        CacheDtype::F16 => Dtype::F16,
    };
    let report = |name: &str, config: &Config| Report {
        name: name.to_owned(),
        analysis: Analysis::new(config, context, cache_dtype),
    };
    let model = report(&arguments.model, &config);
    let against = versus.map(|(name, other)| Against {
        versus: report(name, &other),
        comparison: Comparison::new(&config, &other, context),
    });
    let reports = Reports { model, against };
    if arguments.json {
        let text = serde_json::to_string_pretty(&reports);
        let text = text.map_err(|error| Failure::Failed(format!("cannot write the analysis as JSON: {error}")))?;
        return output::print(&format!("{text}\n"));
    }
    output::print(&for_people(&reports))
}

fn for_people(reports: &Reports) -> String {
    let mut columns = vec![rows(&reports.model)];
    columns.extend(reports.against.iter().map(|against| rows(&against.versus)));
    let labels: Vec<&str> = columns[0].iter().map(|&(label, _)| label).collect();
    let row = |index: usize| {
        let values = columns.iter().map(|column| column[index].1.clone());
        std::iter::once(labels[index].to_owned()).chain(values).collect::<Vec<_>>()
    };
    let wanted = |index: &usize| columns.iter().any(|column| !column[*index].1.is_empty()) || labels[*index].is_empty();
    let mut text = units::table(&(0..labels.len()).filter(wanted).map(row).collect::<Vec<_>>(), &[]);
    text.push_str(&parts(&reports.model));
    if let Some(Against { versus, comparison }) = &reports.against {
        text.push_str(&parts(versus));
        let _ = writeln!(
            text,
            "\nTraining compute by the paper's formula, {} tokens: {:.1}T against {:.1}T FLOPs, {:.1}%",
            comparison.model.sequence,
            comparison.model.flops / 1e12,
            comparison.versus.flops / 1e12,
            100.0 * comparison.ratio
        );
    }
    text
}

/// Label and value; the labels are the same for every model, and a value that does not apply is empty.
fn rows(report: &Report) -> Vec<(&'static str, String)> {
    let Analysis { routing, forward, cache, .. } = &report.analysis;
    let analysis = &report.analysis;
    let of_routing = |text: fn(&RoutingSummary) -> String| routing.as_ref().map_or_else(String::new, text);
    vec![
        ("model", report.name.clone()),
        ("family", analysis.model_type.clone()),
        (
            "layers",
            match analysis.num_moe_layers {
                0 => format!("{}, all dense", analysis.num_layers),
                experts => format!("{}, {experts} of them with experts", analysis.num_layers),
            },
        ),
        ("hidden size", analysis.hidden_size.to_string()),
        ("dense feed-forward width", analysis.intermediate_size.map_or_else(String::new, |width| width.to_string())),
        ("attention", analysis.attention.clone()),
        ("vocabulary", analysis.vocab_size.to_string()),
        ("longest sequence", format!("{} tokens", analysis.max_position_embeddings)),
        (
            "routed experts",
            of_routing(|r| format!("{} of {}, each {} wide", r.topk, r.num_experts, r.intermediate_size)),
        ),
        (
            "shared experts",
            of_routing(|r| match r.shared_intermediate_size {
                0 => "none".to_owned(),
                width => format!("{width} wide in all"),
            }),
        ),
        ("routing", of_routing(describe_routing)),
        ("", String::new()),
        ("total parameters", count(analysis.total_parameters)),
        ("active per token", format!("{}, {:.1}%", count(analysis.active_parameters), 100.0 * analysis.active_share)),
        ("active but for the embedding", count(analysis.active_parameters_without_embedding)),
        ("weights on disk", size(analysis.weight_bytes)),
        ("forward pass of a token", format!("{} at {} tokens", units::flops(forward.total), forward.context)),
        ("  products with weights", units::flops(forward.weights)),
        ("  attention", units::flops(forward.attention)),
        ("KV cache per token", format!("{} ({})", size(cache.bytes_per_token), cache.dtype)),
        ("memory for one sequence", format!("{} at {} tokens", size(analysis.memory_bytes), forward.context)),
    ]
}

fn describe_routing(routing: &RoutingSummary) -> String {
    let mut text = routing.score.replace('_', " ");
    if routing.selection_bias {
        text.push_str(", selection bias");
    }
    if let Some(score) = routing.group_score {
        let _ = write!(text, ", {} of {} groups by {}", routing.topk_group, routing.n_group, score.replace('_', " "));
    }
    if routing.renormalized {
        text.push_str(", weights sum to 1");
    }
    if routing.scale != 1.0 {
        let _ = write!(text, ", times {}", routing.scale);
    }
    text
}

/// Where the parameters are.
fn parts(report: &Report) -> String {
    let heading = ["part", "parameters", "share", "active", "bytes"].map(str::to_owned).to_vec();
    let total = report.analysis.total_parameters as f64;
    let row = |part: &PartSize| {
        vec![
            part_name(part),
            units::grouped(part.parameters),
            format!("{:.1}%", 100.0 * part.parameters as f64 / total),
            units::grouped(part.active_parameters),
            units::bytes(part.bytes),
        ]
    };
    let rows: Vec<_> = std::iter::once(heading).chain(report.analysis.parts.iter().map(row)).collect();
    format!("\n{}\n{}", report.name, units::table(&rows, &[1, 2, 3, 4]))
}

fn part_name(part: &PartSize) -> String {
    // The name is the one that JSON has.
    serde_json::to_value(part.part).ok().and_then(|name| Some(name.as_str()?.replace('_', " "))).unwrap_or_default()
}

fn count(parameters: u64) -> String {
    format!("{} ({})", units::parameters(parameters), units::grouped(parameters))
}

fn size(bytes: u64) -> String {
    if bytes < 1024 { units::bytes(bytes) } else { format!("{} ({})", units::bytes(bytes), units::grouped(bytes)) }
}
