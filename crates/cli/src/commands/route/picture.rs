//! Expert usage as SVG: layers down and experts across, coloured by load; beside each layer its entropy and MaxVio; below, which
//! experts of one layer are chosen together.

use super::{busiest, ratio};
use crate::{
    svg::{begin, escaped, line, text},
    units,
};
use anabranch_model::LayerUsage;
use std::{collections::BTreeMap, fmt::Write};

/// What is said above the picture, and what the picture is to show.
pub(super) struct Subject<'a> {
    pub(super) title: &'a str,
    pub(super) subtitle: &'a str,
    /// The layer whose pairs are shown.
    pub(super) layer: usize,
    /// Equal groups that the experts come in; 1 if the router knows none.
    pub(super) groups: usize,
}

const LEFT: f64 = 70.0;
const TOP: f64 = 96.0;
const LEAST_WIDTH: f64 = 720.0;
/// From the beginning of a column of bars to the next, and a bar's greatest length.
const COLUMN: f64 = 146.0;
const BAR: f64 = 92.0;
/// Pairs that are named.
const PAIRS: usize = 12;

/// Colours that stay apart for most eyes (Okabe and Ito).
const ENTROPY: &str = "#009e73";
const MAX_VIO: &str = "#cc79a7";
const UNUSED: &str = "#9b9b9b";
const SAME: &str = "#d9d9d9";

/// Colours of ratios below and above 1, which is nearly white: blue and orange, which most kinds of colour vision tell apart, darker to
/// either end.
const SCALE: [[f64; 3]; 5] =
    [[11.0, 42.0, 91.0], [42.0, 127.0, 191.0], [246.0, 246.0, 243.0], [226.0, 122.0, 32.0], [112.0, 26.0, 4.0]];
/// Classes to either side of 1, each a quarter of an octave wide: from 1/8 to 8.
const CLASSES: i32 = 12;

/// A cell's colour.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Shade {
    Ratio(i32),
    Never,
}

impl Shade {
    fn of(ratio: f64) -> Self {
        let most = f64::from(CLASSES);
        Self::Ratio((4.0 * ratio.log2()).round().clamp(-most, most) as i32)
    }

    fn colour(self) -> String {
        let Self::Ratio(class) = self else { return UNUSED.to_owned() };
        let at = f64::from(class + CLASSES) / f64::from(2 * CLASSES) * (SCALE.len() - 1) as f64;
        let below = (at as usize).min(SCALE.len() - 2);
        let part = at - below as f64;
        let mixed = |c: usize| (SCALE[below][c] * (1.0 - part) + SCALE[below + 1][c] * part).round() as u8;
        format!("#{:02x}{:02x}{:02x}", mixed(0), mixed(1), mixed(2))
    }
}

/// Where a map of cells lies.
#[derive(Clone, Copy)]
struct Cells {
    left: f64,
    top: f64,
    columns: usize,
    rows: usize,
    width: f64,
    height: f64,
}

impl Cells {
    fn right(&self) -> f64 {
        self.left + self.columns as f64 * self.width
    }

    fn bottom(&self) -> f64 {
        self.top + self.rows as f64 * self.height
    }

    /// Opens a group in which a cell is one unit wide and high.
    fn open(&self, svg: &mut String) {
        let Self { left, top, width, height, .. } = self;
        let _ = writeln!(
            svg,
            "<g transform=\"translate({left} {top}) scale({width} {height})\" shape-rendering=\"crispEdges\">"
        );
    }

    /// Lines between cells that are large enough for it, and stronger ones between groups of experts.
    fn lines(&self, svg: &mut String, groups: usize, both: bool) {
        let (wide, high) = (self.right() - self.left, self.bottom() - self.top);
        let mut lines = |columns: usize, rows: usize, style: &str| {
            let mut path = String::new();
            for column in (1..self.columns).filter(|column| column.is_multiple_of(columns)) {
                let _ = write!(path, "M{} {}v{high}", self.left + column as f64 * self.width, self.top);
            }
            for row in (1..self.rows).filter(|row| row.is_multiple_of(rows)) {
                let _ = write!(path, "M{} {}h{wide}", self.left, self.top + row as f64 * self.height);
            }
            if !path.is_empty() {
                let _ = writeln!(svg, "<path d=\"{path}\" {style} shape-rendering=\"crispEdges\"/>");
            }
        };
        // A step beyond all cells draws none.
        let fine = |size: f64| if size >= 7.0 { 1 } else { usize::MAX };
        lines(fine(self.width), fine(self.height), "stroke=\"#fff\"");
        if groups > 1 {
            let step = (self.columns / groups).max(1);
            lines(step, if both { step } else { usize::MAX }, "stroke=\"#444\" stroke-opacity=\"0.7\"");
        }
        let Self { left, top, .. } = self;
        let _ = writeln!(
            svg,
            "<rect x=\"{left}\" y=\"{top}\" width=\"{wide}\" height=\"{high}\" fill=\"none\" stroke=\"#999\"/>"
        );
    }

    /// Experts' numbers under the columns.
    fn experts_across(&self, svg: &mut String) {
        let step = step(&[1, 2, 4, 8, 16, 32, 64, 128, 256], self.width, 26.0);
        for expert in (0..self.columns).step_by(step) {
            let at = self.left + (expert as f64 + 0.5) * self.width;
            text(svg, [at, self.bottom() + 14.0], "middle", "font-size=\"11\"", &expert.to_string());
        }
        text(
            svg,
            [f64::midpoint(self.left, self.right()), self.bottom() + 30.0],
            "middle",
            "font-size=\"12\"",
            "expert",
        );
    }
}

/// The first step at which labels have room.
fn step(steps: &[usize], size: f64, room: f64) -> usize {
    steps.iter().copied().find(|step| *step as f64 * size >= room).unwrap_or(512)
}

/// Fills cells, a path a colour; neighbours in a row that share a colour are one stroke. Cells are as large as the units of the group
/// around them.
fn fill(svg: &mut String, cells: impl Iterator<Item = (usize, usize, Shade)>) {
    let mut runs: BTreeMap<Shade, String> = BTreeMap::new();
    let mut run: Option<(usize, usize, usize, Shade)> = None;
    let mut end = |run: Option<(usize, usize, usize, Shade)>| {
        if let Some((row, from, to, shade)) = run {
            let _ = write!(runs.entry(shade).or_default(), "M{from} {row}h{}", to - from);
        }
    };
    for (row, column, shade) in cells {
        match &mut run {
            Some((at, _, to, same)) if (*at, *to, *same) == (row, column, shade) => *to += 1,
            _ => end(run.replace((row, column, column + 1, shade))),
        }
    }
    end(run);
    // A stroke lies to both sides of its line.
    svg.push_str("<g transform=\"translate(0 .5)\">\n");
    for (shade, path) in runs {
        let _ = writeln!(svg, "<path stroke=\"{}\" d=\"{path}\"/>", shade.colour());
    }
    svg.push_str("</g>\n");
}

/// Draws it all; every layer has the same number of experts.
pub(super) fn draw(subject: &Subject<'_>, layers: &BTreeMap<usize, LayerUsage>) -> String {
    let experts = layers.values().map(LayerUsage::num_experts).max().unwrap_or(1);
    // Whole pixels: what is not would be blurred.
    let map = Cells {
        left: LEFT,
        top: TOP,
        columns: experts,
        rows: layers.len(),
        width: (768.0 / experts as f64).floor().clamp(1.0, 40.0),
        height: (600.0 / layers.len().max(1) as f64).floor().clamp(8.0, 26.0),
    };
    let side = (576.0 / experts as f64).round().clamp(1.0, 28.0);
    let top = map.bottom() + 166.0;
    let pairs = Cells { left: LEFT, top, columns: experts, rows: experts, width: side, height: side };
    let layer = layers.get(&subject.layer).filter(|usage| shares_tokens(usage));
    let least = if layer.is_some() { pairs.right() + 330.0 } else { LEAST_WIDTH };
    let width = LEAST_WIDTH.max(map.right() + 28.0 + 2.0 * COLUMN).max(least);
    let below = pairs.bottom().max(top + 40.0 + 18.0 * PAIRS as f64);
    let height = if layer.is_some() { below + 112.0 } else { top };

    let mut svg = begin(width, height);
    text(&mut svg, [LEFT, 32.0], "start", "font-size=\"18\" font-weight=\"bold\"", subject.title);
    text(&mut svg, [LEFT, 54.0], "start", "fill=\"#555\"", subject.subtitle);
    loads(&mut svg, &map, layers, subject);
    bars(&mut svg, &map, layers);
    let captions = ["load: tokens of an expert, as a multiple of an even load", "chosen by no token"];
    legend(&mut svg, [LEFT, map.bottom() + 66.0], captions, UNUSED);

    if let Some(layer) = layer {
        together(&mut svg, &pairs, layer, subject);
        let captions = ["tokens of a pair, as a multiple of what the two loads alone would give", "the same expert"];
        legend(&mut svg, [LEFT, below + 66.0], captions, SAME);
    } else {
        text(&mut svg, [LEFT, top - 30.0], "start", "fill=\"#555\"", "No token is shared by two experts.");
    }
    svg.push_str("</svg>\n");
    svg
}

/// Whether any token chose two experts.
fn shares_tokens(usage: &LayerUsage) -> bool {
    let mut pairs = (0..usage.num_experts()).flat_map(|a| (0..a).map(move |b| (a, b)));
    pairs.any(|(a, b)| usage.together(a, b) > 0)
}

/// The heat map.
fn loads(svg: &mut String, map: &Cells, layers: &BTreeMap<usize, LayerUsage>, subject: &Subject<'_>) {
    map.open(svg);
    let cells = layers.values().enumerate().flat_map(|(row, usage)| {
        let shade = |load: f64| if load > 0.0 { Shade::of(load) } else { Shade::Never };
        usage.relative_loads().into_iter().enumerate().map(move |(expert, load)| (row, expert, shade(load)))
    });
    fill(svg, cells);
    svg.push_str("</g>\n");
    map.lines(svg, subject.groups, false);
    map.experts_across(svg);

    text(svg, [LEFT - 8.0, TOP - 10.0], "end", "font-size=\"12\"", "layer");
    let step = step(&[1, 2, 5, 10, 20, 50, 100], map.height, 11.0);
    for (row, (layer, usage)) in layers.iter().enumerate() {
        let (top, shown) = (map.top + row as f64 * map.height, *layer == subject.layer);
        // The shown layer's number comes first, and needs room.
        let crowded = layer.abs_diff(subject.layer) as f64 * map.height < 11.0;
        if shown || layer.is_multiple_of(step) && !crowded {
            let style = if shown { "font-size=\"11\" font-weight=\"bold\"" } else { "font-size=\"11\"" };
            text(svg, [LEFT - 8.0, top + map.height / 2.0 + 4.0], "end", style, &layer.to_string());
        }
        let few: Vec<String> =
            busiest(usage, 5).iter().map(|(expert, load)| format!("{expert} ({})", ratio(*load))).collect();
        let words = format!("layer {layer}: busiest experts, against an even load: {}", few.join(", "));
        let _ = writeln!(
            svg,
            "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{}\" height=\"{}\" fill-opacity=\"0\"><title>{}</title></rect>",
            map.right() - LEFT,
            map.height,
            escaped(&words)
        );
    }
}

/// Entropy and MaxVio beside the layers.
fn bars(svg: &mut String, map: &Cells, layers: &BTreeMap<usize, LayerUsage>) {
    let entropy: Vec<f64> = layers.values().map(LayerUsage::entropy).collect();
    let max_vio: Vec<f64> = layers.values().map(LayerUsage::max_vio).collect();
    let most = max_vio.iter().copied().fold(0.0, f64::max);
    let left = map.right() + 28.0;
    column(svg, map, left, ("entropy (1 is even)", ENTROPY), (&entropy, 1.0, 3));
    column(svg, map, left + COLUMN, ("MaxVio (0 is even)", MAX_VIO), (&max_vio, most, 2));
}

/// A bar for each row of a map, with its value to some digits; the longest is for `most`.
fn column(
    svg: &mut String,
    map: &Cells,
    left: f64,
    (name, colour): (&str, &str),
    (values, most, digits): (&[f64], f64, usize),
) {
    text(svg, [left, TOP - 10.0], "start", "font-size=\"12\"", name);
    let (height, size) = ((map.height * 0.72).round(), map.height.min(11.0));
    let mut words = String::new();
    for (row, value) in values.iter().enumerate() {
        let top = map.top + row as f64 * map.height;
        let length = if most > 0.0 { BAR * value / most } else { 0.0 };
        let y = top + ((map.height - height) / 2.0).floor();
        let _ =
            writeln!(svg, "<rect x=\"{left}\" y=\"{y}\" width=\"{length:.1}\" height=\"{height}\" fill=\"{colour}\"/>");
        let at = top + map.height / 2.0 + size * 0.36;
        let _ = writeln!(words, "<text x=\"{:.1}\" y=\"{at:.1}\">{value:.digits$}</text>", left + length + 4.0);
    }
    let _ = writeln!(svg, "<g font-size=\"{size}\" fill=\"#444\">\n{words}</g>");
    line(svg, [left, map.top, left, map.bottom()], "stroke=\"#999\"");
}

/// Which experts of a layer are chosen together.
fn together(svg: &mut String, map: &Cells, usage: &LayerUsage, subject: &Subject<'_>) {
    let (layer, experts) = (subject.layer, usage.num_experts());
    let heading = format!("Experts of layer {layer} that are chosen together");
    text(svg, [LEFT, map.top - 14.0], "start", "font-size=\"15\" font-weight=\"bold\"", &heading);
    let lift = usage.lift();

    map.open(svg);
    let _ = writeln!(svg, "<rect width=\"{experts}\" height=\"{experts}\" fill=\"{SAME}\"/>\n<g id=\"pairs\">");
    let below = (0..experts).flat_map(|a| (0..a).map(move |b| (a, b)));
    fill(svg, below.clone().map(|(a, b)| (a, b, Shade::of(lift[a * experts + b]))));
    // The other half is the same with rows and columns exchanged.
    svg.push_str("</g>\n<use href=\"#pairs\" transform=\"matrix(0 1 1 0 0 0)\"/>\n</g>\n");
    map.lines(svg, subject.groups, true);
    map.experts_across(svg);
    for expert in (0..experts).step_by(step(&[1, 2, 4, 8, 16, 32, 64, 128, 256], map.height, 13.0)) {
        let at = map.top + (expert as f64 + 0.5) * map.height + 4.0;
        text(svg, [LEFT - 8.0, at], "end", "font-size=\"11\"", &expert.to_string());
    }

    let mut pairs: Vec<(usize, usize)> = below.filter(|(a, b)| lift[a * experts + b] > 1.0).collect();
    pairs.sort_by(|x, y| lift[y.0 * experts + y.1].total_cmp(&lift[x.0 * experts + x.1]));
    let left = map.right() + 36.0;
    let heading = if pairs.is_empty() {
        "no pair is above what its loads give"
    } else {
        "pairs most above what their loads give"
    };
    text(svg, [left, map.top + 12.0], "start", "font-weight=\"bold\"", heading);
    for (index, (a, b)) in pairs.into_iter().take(PAIRS).enumerate() {
        let y = map.top + 36.0 + 18.0 * index as f64;
        text(svg, [left, y], "start", "", &format!("{b} and {a}"));
        text(svg, [left + 140.0, y], "end", "", &ratio(lift[a * experts + b]));
        let tokens = format!("{} tokens", units::grouped(usage.together(a, b)));
        text(svg, [left + 250.0, y], "end", "fill=\"#666\"", &tokens);
    }
}

/// What the colours mean, and the one that is no ratio.
fn legend(svg: &mut String, [left, top]: [f64; 2], [caption, other]: [&str; 2], other_colour: &str) {
    const SWATCH: f64 = 14.0;
    text(svg, [left, top - 8.0], "start", "font-size=\"12\"", caption);
    let swatch = |svg: &mut String, x: f64, colour: &str| {
        let _ = writeln!(svg, "<rect x=\"{x}\" y=\"{top}\" width=\"{SWATCH}\" height=\"{SWATCH}\" fill=\"{colour}\"/>");
    };
    let y = top + SWATCH + 14.0;
    for (index, class) in (-CLASSES..=CLASSES).enumerate() {
        let x = left + index as f64 * SWATCH;
        swatch(svg, x, &Shade::Ratio(class).colour());
        if class % 4 == 0 {
            let name = ["1/8 or less", "1/4", "1/2", "1", "2", "4", "8 or more"][index / 4];
            text(svg, [x + SWATCH / 2.0, y], "middle", "font-size=\"11\"", name);
        }
    }
    let x = left + f64::from(2 * CLASSES + 3) * SWATCH;
    swatch(svg, x, other_colour);
    text(svg, [x + SWATCH + 6.0, top + 11.0], "start", "font-size=\"12\"", other);
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_model::TopkIds;

    /// Layers that prefer some experts, more so the deeper they are, and pairs of neighbours.
    fn skewed(layers: usize, experts: usize, topk: usize, tokens: usize) -> BTreeMap<usize, LayerUsage> {
        let mut state = 1_u64;
        let mut random = || {
            // The upper bits of a linear congruence (Knuth's MMIX).
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1_u64 << 53) as f64
        };
        let mut usage = BTreeMap::new();
        for layer in 1..=layers {
            let liking: Vec<f64> = (0..experts).map(|_| random().powf(4.0 * layer as f64 / layers as f64)).collect();
            let mut ids = Vec::new();
            for _ in 0..tokens {
                let topic = (random() * 16.0) as usize;
                let score = |(expert, liking): (usize, &f64)| {
                    let near = if expert * 16 / experts == topic { 3.0 } else { 1.0 };
                    (near * liking * (random() + 0.02), expert as i32)
                };
                let mut scores: Vec<_> = liking.iter().enumerate().map(score).collect();
                scores.sort_by(|a, b| b.0.total_cmp(&a.0));
                ids.extend(scores[..topk].iter().map(|(_, expert)| *expert));
            }
            let mut counted = LayerUsage::new(experts);
            counted.add(&TopkIds { ids, topk }).unwrap();
            usage.insert(layer, counted);
        }
        usage
    }

    fn drawn(layers: &BTreeMap<usize, LayerUsage>, groups: usize) -> String {
        let subject =
            Subject { title: "a <model>", subtitle: "of tests", layer: *layers.keys().last().unwrap_or(&0), groups };
        let svg = draw(&subject, layers);
        for element in ["g", "text", "title", "svg"] {
            let opened = svg.matches(&format!("<{element} ")).count() + svg.matches(&format!("<{element}>")).count();
            assert_eq!(opened, svg.matches(&format!("</{element}>")).count(), "{element}");
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.contains("a &lt;model&gt;"));
        svg
    }

    /// Cells that strokes in a text cover.
    fn covered(svg: &str) -> usize {
        let strokes = svg.lines().filter(|line| line.starts_with("<path stroke=\"#") && line.contains(" d=\""));
        let runs = strokes.flat_map(|line| line.split('h').skip(1));
        runs.filter_map(|run| run.split(['M', '"']).next()?.parse::<usize>().ok()).sum()
    }

    #[test]
    fn every_cell_is_painted_once() {
        for (layers, experts, topk) in [(1, 8, 1), (2, 8, 2), (27, 64, 6), (3, 300, 5)] {
            let svg = drawn(&skewed(layers, experts, topk, 50), 1);
            let pairs = if topk > 1 { experts * (experts - 1) / 2 } else { 0 };
            assert_eq!(covered(&svg), layers * experts + pairs, "{layers} by {experts}");
        }
    }

    #[test]
    fn large_models_are_small_files() {
        let svg = drawn(&skewed(61, 256, 8, 300), 8);
        assert!(svg.len() < 500_000, "{} bytes", svg.len());
    }

    #[test]
    fn nothing_to_show_is_an_empty_picture() {
        assert_eq!(covered(&drawn(&BTreeMap::new(), 1)), 0);
        assert_eq!(covered(&drawn(&BTreeMap::from([(0, LayerUsage::new(4))]), 1)), 4);
    }

    #[test]
    fn shades_are_symmetric_and_end() {
        assert!(
            Shade::of(1.0) == Shade::Ratio(0) && Shade::of(0.0) == Shade::of(0.125) && Shade::of(1e9) == Shade::of(8.0)
        );
        assert_eq!(Shade::of(1.0).colour(), "#f6f6f3");
        assert_eq!(Shade::of(0.0).colour(), "#0b2a5b");
        assert_eq!(Shade::of(8.0).colour(), "#701a04");
        assert!(Shade::of(2.0) == Shade::Ratio(4) && Shade::of(0.5) == Shade::Ratio(-4));
    }
}
