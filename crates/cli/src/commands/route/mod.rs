//! `anabranch route`: which experts each layer uses on a text.

mod picture;

use crate::{
    device::{Place, Task, Where},
    failure::Failure,
    interrupt,
    memory::{self, Demand},
    output, progress,
    prompts::Prompts,
    source::Source,
    units,
};
use anabranch_model::{
    Config, Error, ExpertUsage, LayerUsage, check_writable,
    config::{FeedForward, Moe},
};
use serde::Serialize;
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

/// Show which experts each layer uses on a text, as a table, a picture and JSON
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    anabranch route --model DIR --prompt-file book.txt --plot book.svg\n  \
    anabranch route --model DIR --prompt 'fn main() {}' --prompt 'Once upon a time' --json usage.json\n\n\
    entropy  of a layer's choices over its E experts, -sum p ln p / ln E: 1 if all have the same load, 0 if one has all\n\
    MaxVio   maximal violation of balance over the whole text, (max load - mean load) / mean load (arXiv 2408.15664)\n\
    busiest  experts with the highest load, and their share of all choices; an even share is 1/E\n\
    unused   how many experts no token chose, and the first of them\n\n\
    The picture has a row for each layer and a column for each expert, in their order, coloured by load. Below it is, for one layer, \
    how often two experts are chosen by the same token, against what their loads alone would give: \
    (n + 1) / (x + 1) for n tokens where independent choices with these loads give x.\n\n\
    Text goes through the model some hundreds of tokens at a time, positions continuing. After --context tokens a new sequence begins, \
    with position 0 and without a token that begins texts. Prompts are sequences of their own, counted together. The model reads the \
    text, it writes none.\n\n\
    JSON has for every layer `load` [E], the tokens that chose each expert, and `together`, whose row a holds for every expert b < a \
    the tokens that chose both. Files appear whole or not at all.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    prompts: Prompts,
    /// Draw a picture, as SVG
    #[arg(long, value_name = "FILE.svg", value_parser = svg_path)]
    plot: Option<PathBuf>,
    /// Layer whose pairs of experts the picture shows [default: the one with the highest MaxVio]
    #[arg(long, value_name = "N", requires = "plot")]
    layer: Option<usize>,
    /// Write all counts as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Longest sequence; a longer text is cut [default, and most: the model's longest]
    #[arg(long, value_name = "N", value_parser = super::at_least_one)]
    context: Option<usize>,
    #[command(flatten)]
    place: Where,
    /// Refuse to start if more than this is needed, as 8G or 512M [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    memory_limit: Option<u64>,
}

/// Experts that the table names in a layer.
const BUSIEST: usize = 4;
const UNUSED: usize = 6;
/// Characters of a name in the picture.
const NAME: usize = 40;

fn svg_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    let extension = path.extension().map(OsStr::to_ascii_lowercase);
    if extension.is_some_and(|extension| extension == "svg") {
        return Ok(path);
    }
    Err("the picture is SVG: expected a name that ends in .svg".to_owned())
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    arguments.place.run(arguments)
}

impl Task for &Arguments {
    fn on<P: Place>(self, place: P) -> Result<(), Failure> {
        let config = self.source.config()?;
        let moe = ExpertUsage::check(&config)?;
        self.check_layer(&config)?;
        let texts = self.prompts.texts()?;
        let tokenizer = self.source.tokenizer(&config)?;
        let texts = texts.iter().map(|text| tokenizer.encode(text)).collect::<Result<Vec<_>, Error>>()?;
        let most = config.max_position_embeddings;
        let context = self.context.unwrap_or(most).min(most);
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0).min(context);
        let demand = Demand { cached_tokens: longest, logit_rows: 0 };
        memory::check::<P>(&self.source, &config, &demand, self.memory_limit)?;
        let files = || [&self.plot, &self.json].into_iter().flatten();
        interrupt::deferred(|| files().try_for_each(|path| check_writable(path)))?;

        let model = self.source.load(&config, place)?;
        let all = texts.iter().map(|text| text.len() as u64).sum();
        // No file is there yet: Ctrl-C may end a pass at once, however long it is.
        let usage = progress::reading(|report| {
            ExpertUsage::of_texts(&model, &texts, context, &mut |done| {
                report(done, all);
                if interrupt::requested() { Err(Error::Interrupted) } else { Ok(()) }
            })
        })?;
        let report = Report::new(self, &config, moe, &usage);
        self.write(&report, moe, &usage)?;
        output::print(&table(&report, &usage))
    }
}

impl Arguments {
    fn check_layer(&self, config: &Config) -> Result<(), Failure> {
        let Some(layer) = self.layer else { return Ok(()) };
        let problem = match config.layers.get(layer) {
            Some(FeedForward::Moe) => return Ok(()),
            Some(FeedForward::Dense) => "is dense",
            None => "does not exist",
        };
        let routing = |layer: &usize| config.layers[*layer] == FeedForward::Moe;
        let routing: Vec<usize> = (0..config.layers.len()).filter(routing).collect();
        let (first, last) = (routing.first().unwrap_or(&0), routing.last().unwrap_or(&0));
        Err(Failure::Failed(format!("layer {layer} {problem}; the layers with experts are from {first} to {last}")))
    }

    fn write(&self, report: &Report<'_>, moe: &Moe, usage: &ExpertUsage) -> Result<(), Failure> {
        if let Some(path) = &self.json {
            let text = serde_json::to_string(report);
            let text = text.map_err(|error| Failure::Failed(format!("cannot write the counts as JSON: {error}")))?;
            output::file(path, &format!("{text}\n"))?;
        }
        if let Some(path) = &self.plot {
            let subject = picture::Subject {
                title: &format!("Expert usage of {}", shortened(&report.model)),
                subtitle: &report.subtitle(),
                layer: self.layer.or_else(|| usage.most_uneven()).unwrap_or_default(),
                groups: moe.routing.group_limit().map_or(1, |groups| groups.n_group),
            };
            output::file(path, &picture::draw(&subject, usage.layers()))?;
        }
        Ok(())
    }

    /// The model's name: of its folder, or of what its weights were made for.
    fn model_name(&self) -> String {
        let name = self.source.name();
        let whole = self.source.folder().and_then(|folder| folder.canonicalize().ok());
        let last = whole.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        last.unwrap_or(name)
    }
}

fn shortened(name: &str) -> String {
    if name.chars().count() <= NAME {
        return name.to_owned();
    }
    let begin: String = name.chars().take(NAME - 3).collect();
    format!("{begin}...")
}

/// Everything that was counted, as JSON has it.
#[derive(Serialize)]
struct Report<'a> {
    model: String,
    model_type: &'a str,
    text: String,
    tokens: u64,
    sequences: u64,
    num_experts: usize,
    topk: usize,
    layers: Vec<Layer>,
}

#[derive(Serialize)]
struct Layer {
    #[serde(rename = "layer")]
    index: usize,
    entropy: f64,
    max_vio: f64,
    load: Vec<u64>,
    together: Vec<Vec<u64>>,
}

impl<'a> Report<'a> {
    fn new(arguments: &Arguments, config: &'a Config, moe: &Moe, usage: &ExpertUsage) -> Self {
        let layer = |(index, usage): (&usize, &LayerUsage)| Layer {
            index: *index,
            entropy: usage.entropy(),
            max_vio: usage.max_vio(),
            load: usage.loads(),
            together: (0..usage.num_experts()).map(|a| (0..a).map(|b| usage.together(a, b)).collect()).collect(),
        };
        Self {
            model: arguments.model_name(),
            model_type: &config.model_type,
            text: arguments.prompts.name(),
            tokens: usage.tokens(),
            sequences: usage.sequences(),
            num_experts: moe.routing.num_experts(),
            topk: moe.routing.topk(),
            layers: usage.layers().iter().map(layer).collect(),
        }
    }

    /// What was counted, in a line.
    fn subtitle(&self) -> String {
        let plural = |count: u64| if count == 1 { "" } else { "s" };
        let (layers, text) = (self.layers.len(), shortened(&self.text));
        format!(
            "{}, {layers} layer{} with {} of {} experts a token; {} token{} of {text} in {} sequence{}",
            self.model_type,
            plural(layers as u64),
            self.topk,
            self.num_experts,
            units::grouped(self.tokens),
            plural(self.tokens),
            units::grouped(self.sequences),
            plural(self.sequences),
        )
    }
}

/// The experts with the highest loads, as multiples of an even load; the first of equals first, and none that is unused.
fn busiest(usage: &LayerUsage, count: usize) -> Vec<(usize, f64)> {
    let mut loads: Vec<_> = usage.relative_loads().into_iter().enumerate().filter(|(_, load)| *load > 0.0).collect();
    loads.sort_by(|a, b| b.1.total_cmp(&a.1));
    loads.truncate(count);
    loads
}

/// `2.3x`, and two digits below 1.
fn ratio(value: f64) -> String {
    if value < 0.995 { format!("{value:.2}x") } else { format!("{value:.1}x") }
}

/// For people: a line a layer.
fn table(report: &Report<'_>, usage: &ExpertUsage) -> String {
    let mut rows = vec![["layer", "entropy", "MaxVio", "busiest (share)", "unused"].map(str::to_owned).to_vec()];
    for (layer, usage) in usage.layers() {
        let share = |load: f64| 100.0 * load / usage.num_experts() as f64;
        let name = |(expert, load): &(usize, f64)| format!("{expert} ({:.1}%)", share(*load));
        let busiest: Vec<String> = busiest(usage, BUSIEST).iter().map(name).collect();
        let loads = usage.loads();
        let unused: Vec<usize> = (0..loads.len()).filter(|expert| loads[*expert] == 0).collect();
        let named: Vec<String> = unused.iter().take(UNUSED).map(usize::to_string).collect();
        let unused = match unused.len() {
            0 => "0".to_owned(),
            count if count > UNUSED => format!("{count}: {}, ...", named.join(", ")),
            count => format!("{count}: {}", named.join(", ")),
        };
        rows.push(vec![
            layer.to_string(),
            format!("{:.3}", usage.entropy()),
            format!("{:.2}", usage.max_vio()),
            busiest.join(", "),
            unused,
        ]);
    }
    format!("{}: {}\n\n{}", report.model, report.subtitle(), units::table(&rows, &[0, 1, 2]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_svg_is_drawn() {
        for right in ["a.svg", "folder/B.SVG"] {
            assert_eq!(svg_path(right), Ok(PathBuf::from(right)));
        }
        for wrong in ["a.png", "svg", "", ".svg", "a.svg.gz"] {
            assert!(svg_path(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_and_ratios_fit() {
        assert_eq!(shortened("short"), "short");
        assert_eq!(shortened(&"ä".repeat(50)).chars().count(), NAME);
        assert_eq!([0.0, 0.126, 0.996, 12.34].map(ratio), ["0.00x", "0.13x", "1.0x", "12.3x"]);
    }

    #[test]
    fn busiest_experts_come_first() {
        let mut usage = LayerUsage::new(4);
        usage.add(&anabranch_model::TopkIds { ids: vec![3, 1, 3, 1, 3, 0], topk: 2 }).unwrap();
        assert_eq!(busiest(&usage, 2), [(3, 2.0), (1, 4.0 / 3.0)]);
        assert_eq!(busiest(&usage, 9).len(), 3);
    }
}
