//! Measured points beside what the GPU can do at best, as SVG: TFLOP/s over FLOPs a byte, both logarithmic.

use super::{
    ceilings::Ceilings,
    record::{Peer, Record},
};
use crate::svg::{begin, escaped, line, text};
use std::fmt::Write;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 580.0;
/// The plot's area; the legend is to the right of it.
const LEFT: f64 = 76.0;
const RIGHT: f64 = 740.0;
const TOP: f64 = 56.0;
const BOTTOM: f64 = 520.0;

/// Colours that stay apart for most eyes (Okabe and Ito), one a shape, over and over.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// An axis: values from `low` to `high` onto `from` to `to`.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// From the last 1, 2 or 5 times a power of ten below all values to the first above them.
    fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let positive = values.filter(|value| value.is_finite() && *value > 0.0);
        let (low, high) = positive.fold((f64::MAX, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
        let (low, high) = if high > 0.0 { (low / 1.15, high * 1.15) } else { (1.0, 10.0) };
        let ticks: Vec<f64> = ticks(low / 10.0, high * 10.0).collect();
        let below = ticks.iter().rev().find(|tick| **tick <= low).copied();
        let above = ticks.iter().find(|tick| **tick >= high).copied();
        Self { low: below.unwrap_or(low), high: above.unwrap_or(high), from, to }
    }

    fn at(&self, value: f64) -> f64 {
        self.from + (self.to - self.from) * (value / self.low).ln() / (self.high / self.low).ln()
    }
}

/// 1, 2 and 5 times every power of ten between two values.
fn ticks(low: f64, high: f64) -> impl Iterator<Item = f64> {
    let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let all = powers.flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)));
    all.filter(move |tick| (low * 0.999..=high * 1.001).contains(tick))
}

/// Draws the points. Of the peers' only the fastest at a point that was measured is drawn.
pub(super) fn draw(records: &[Record], peers: &[Peer], ceilings: Ceilings) -> String {
    let best: Vec<Option<&Peer>> = records.iter().map(|record| fastest(record, peers)).collect();
    let places: Vec<(f64, f64)> = records.iter().map(Record::place).collect();
    let peer_place =
        |at: usize| best[at].map(|peer| (places[at].0, places[at].1 * records[at].us_median / peer.us_median));
    let peer_places: Vec<Option<(f64, f64)>> = (0..records.len()).map(peer_place).collect();

    let ridge = ceilings.gemm / ceilings.read;
    let all = || places.iter().copied().chain(peer_places.iter().flatten().copied());
    let x = Axis::around(all().map(|(x, _)| x).chain([ridge * 2.0]), LEFT, RIGHT);
    let y = Axis::around(all().map(|(_, y)| y).chain([ceilings.gemm]), BOTTOM, TOP);

    let mut svg = begin(WIDTH, HEIGHT);
    let device = records.first().map_or("", |record| record.device.as_str());
    text(
        &mut svg,
        [LEFT, 30.0],
        "start",
        "font-size=\"17\" font-weight=\"bold\"",
        &format!("MoE layer, bf16, {device}"),
    );
    grid(&mut svg, &x, &y);
    roofs(&mut svg, &x, &y, ceilings);
    svg.push_str("<g clip-path=\"url(#area)\">\n");
    let names = names(records);
    for (name, colour) in names.iter().zip(COLOURS.iter().cycle()) {
        let own: Vec<usize> = (0..records.len()).filter(|at| records[*at].shape == *name).collect();
        series(&mut svg, &own, colour, [&x, &y], (records, &places, &best, &peer_places));
    }
    svg.push_str("</g>\n");
    legend(&mut svg, &names, peer_places.iter().any(Option::is_some));
    svg.push_str("</svg>\n");
    svg
}

/// The fastest peer at a point.
fn fastest<'a>(record: &Record, peers: &'a [Peer]) -> Option<&'a Peer> {
    let shape = |hidden, intermediate, experts, topk, tokens| [hidden, intermediate, experts, topk, tokens];
    let own = shape(record.hidden, record.intermediate, record.experts, record.topk, record.tokens);
    let same = |peer: &&Peer| shape(peer.hidden, peer.intermediate, peer.experts, peer.topk, peer.tokens) == own;
    // Theirs have no shared experts and measure one layer.
    let comparable = record.shared == 0 && !record.steady;
    peers.iter().filter(|_| comparable).filter(same).min_by(|a, b| a.us_median.total_cmp(&b.us_median))
}

/// The shapes' names in the order in which they come.
fn names(records: &[Record]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for record in records {
        if !names.contains(&record.shape.as_str()) {
            names.push(&record.shape);
        }
    }
    names
}

fn grid(svg: &mut String, x: &Axis, y: &Axis) {
    for tick in ticks(x.low, x.high) {
        let at = x.at(tick);
        line(svg, [at, TOP, at, BOTTOM], "stroke=\"#e6e6e6\"");
        text(svg, [at, BOTTOM + 18.0], "middle", "font-size=\"12\"", &number(tick));
    }
    for tick in ticks(y.low, y.high) {
        let at = y.at(tick);
        line(svg, [LEFT, at, RIGHT, at], "stroke=\"#e6e6e6\"");
        text(svg, [LEFT - 8.0, at + 4.0], "end", "font-size=\"12\"", &number(tick));
    }
    let (width, height) = (RIGHT - LEFT, BOTTOM - TOP);
    let area = format!("x=\"{LEFT}\" y=\"{TOP}\" width=\"{width}\" height=\"{height}\"");
    let _ =
        writeln!(svg, "<clipPath id=\"area\"><rect {area}/></clipPath>\n<rect {area} fill=\"none\" stroke=\"#999\"/>");
    text(
        svg,
        [f64::midpoint(LEFT, RIGHT), BOTTOM + 42.0],
        "middle",
        "",
        "FLOP per byte that must move (weights of experts hit, input, output)",
    );
    let middle = f64::midpoint(TOP, BOTTOM);
    text(svg, [22.0, middle], "middle", &format!("transform=\"rotate(-90 22 {middle})\""), "TFLOP/s");
}

/// The ceilings, each with its rate.
fn roofs(svg: &mut String, x: &Axis, y: &Axis, Ceilings { read, copy, gemm }: Ceilings) {
    let slope = |svg: &mut String, rate: f64, style: &str| {
        let start = (y.low / rate).max(x.low);
        let (start, end) = ([x.at(start), y.at(start * rate)], [x.at(gemm / rate), y.at(gemm)]);
        line(svg, [start[0], start[1], end[0], end[1]], style);
        (start, end)
    };
    let (start, end) = slope(svg, read, "stroke=\"#444\" stroke-width=\"2\"");
    slope(svg, copy, "stroke=\"#444\" stroke-width=\"1.2\" stroke-dasharray=\"6 4\"");
    line(svg, [end[0], end[1], RIGHT, end[1]], "stroke=\"#444\" stroke-width=\"2\"");
    let angle = ((end[1] - start[1]) / (end[0] - start[0])).atan().to_degrees();
    let at = [start[0] + 0.62 * (end[0] - start[0]), start[1] + 0.62 * (end[1] - start[1])];
    let turned = format!("font-size=\"12\" transform=\"rotate({angle:.2} {:.1} {:.1})\"", at[0], at[1]);
    text(svg, [at[0], at[1] - 8.0], "middle", &turned, &format!("read {read:.2} TB/s (dashed: copy {copy:.2})"));
    // Near the bend, where points seldom are.
    text(
        svg,
        [(end[0] + 160.0).min(RIGHT - 6.0), end[1] - 7.0],
        "end",
        "font-size=\"12\"",
        &format!("own GEMM {gemm:.0} TFLOP/s"),
    );
}

/// Records, their places, the fastest peers and theirs.
type Points<'a> = (&'a [Record], &'a [(f64, f64)], &'a [Option<&'a Peer>], &'a [Option<(f64, f64)>]);

/// One shape's points, from few tokens to many.
fn series(
    svg: &mut String,
    own: &[usize],
    colour: &str,
    [x, y]: [&Axis; 2],
    (records, places, best, peers): Points<'_>,
) {
    let on_paper = |(a, b): (f64, f64)| (x.at(a), y.at(b));
    let path: Vec<String> = own.iter().map(|at| on_paper(places[*at])).map(|(a, b)| format!("{a:.1},{b:.1}")).collect();
    let _ = writeln!(
        svg,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-opacity=\"0.35\"/>",
        path.join(" ")
    );
    for at in own {
        let record = &records[*at];
        let what = format!("{}, {} tokens", record.shape, record.tokens);
        let (a, b) = on_paper(places[*at]);
        if let (Some(peer), Some(place)) = (best[*at], peers[*at]) {
            let (c, d) = on_paper(place);
            let title = escaped(&format!("{}: {what}, {:.1} us", peer.name, peer.us_median));
            let diamond =
                format!("{c:.1},{:.1} {:.1},{d:.1} {c:.1},{:.1} {:.1},{d:.1}", d - 6.0, c + 6.0, d + 6.0, c - 6.0);
            let _ = writeln!(
                svg,
                "<polygon points=\"{diamond}\" fill=\"#fff\" fill-opacity=\"0.7\" stroke=\"{colour}\" stroke-width=\"1.4\"><title>{title}</title></polygon>"
            );
        }
        let title = escaped(&format!("{what}: {:.1} us", record.us_median));
        let _ = writeln!(
            svg,
            "<circle cx=\"{a:.1}\" cy=\"{b:.1}\" r=\"4.5\" fill=\"{colour}\" stroke=\"#fff\" stroke-width=\"0.8\"><title>{title}</title></circle>"
        );
    }
}

fn legend(svg: &mut String, names: &[&str], with_peers: bool) {
    let x = RIGHT + 24.0;
    let mut y = TOP + 12.0;
    for (name, colour) in names.iter().zip(COLOURS.iter().cycle()) {
        let _ = writeln!(svg, "<circle cx=\"{x}\" cy=\"{}\" r=\"5\" fill=\"{colour}\"/>", y - 4.0);
        text(svg, [x + 14.0, y], "start", "", name);
        y += 22.0;
    }
    y += 10.0;
    let _ = writeln!(svg, "<circle cx=\"{x}\" cy=\"{}\" r=\"4.5\" fill=\"#666\"/>", y - 4.0);
    text(svg, [x + 14.0, y], "start", "", "anabranch");
    if with_peers {
        y += 22.0;
        let (c, d) = (x, y - 4.0);
        let diamond = format!("{c},{} {},{d} {c},{} {},{d}", d - 6.0, c + 6.0, d + 6.0, c - 6.0);
        let _ = writeln!(svg, "<polygon points=\"{diamond}\" fill=\"#fff\" stroke=\"#666\" stroke-width=\"1.4\"/>");
        text(svg, [x + 14.0, y], "start", "", "fastest peer there");
    }
    y += 22.0;
    text(svg, [x - 5.0, y], "start", "font-size=\"12\" fill=\"#666\"", "a line runs from few");
    text(svg, [x - 5.0, y + 16.0], "start", "font-size=\"12\" fill=\"#666\"", "tokens to many");
}

/// `0.5`, `20`, `1,000`.
fn number(value: f64) -> String {
    if value < 1.0 { format!("{value}") } else { crate::units::grouped(value.round() as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(shape: &str, tokens: usize, us_median: f64) -> Record {
        Record {
            shape: shape.to_owned(),
            hidden: 2048,
            intermediate: 768,
            experts: 128,
            topk: 8,
            shared: 0,
            tokens,
            dtype: "bf16",
            us_median,
            us_min: us_median,
            us_p90: us_median,
            experts_hit: 128.min(8 * tokens),
            tflops: 6.0 * (8 * tokens * 2048 * 768) as f64 / us_median / 1e6,
            weight_gbps: 0.0,
            floor_us: 0.0,
            rel_error: 0.0,
            launch: "graph",
            us_eager: None,
            us_graph: us_median,
            samples: 50,
            routing: "normal",
            from: "logits",
            logits: "seed",
            chosen: String::new(),
            steady: false,
            layers: 1,
            weight_sets: 1,
            device: "a <GPU>".to_owned(),
        }
    }

    fn peer(name: &str, tokens: usize, us_median: f64) -> Peer {
        let name = name.to_owned();
        Peer { name, hidden: 2048, intermediate: 768, experts: 128, topk: 8, tokens, us_median }
    }

    const CEILINGS: Ceilings = Ceilings { read: 4.6, copy: 4.2, gemm: 700.0 };

    #[test]
    fn every_point_is_drawn_once_and_the_fastest_peer_beside_it() {
        let records = [record("qwen3", 1, 35.0), record("qwen3", 512, 300.0), record("other", 64, 280.0)];
        let peers = [peer("slow", 1, 90.0), peer("fast", 1, 34.0), peer("fast", 7, 34.0)];
        let svg = draw(&records, &peers, CEILINGS);
        assert_eq!(svg.matches("<circle").count() - 3, 3, "three points and three in the legend: {svg}");
        assert_eq!(svg.matches("<polygon").count() - 1, 1);
        assert!(svg.contains("<title>fast: qwen3, 1 tokens, 34.0 us</title>") && !svg.contains("slow"));
        assert!(svg.contains("a &lt;GPU&gt;") && svg.contains("own GEMM 700 TFLOP/s"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        for part in svg.split("cx=\"").skip(1).take(3) {
            let x: f64 = part.split('"').next().unwrap().parse().unwrap();
            assert!((LEFT..=RIGHT).contains(&x));
        }
    }

    #[test]
    fn nothing_measured_is_an_empty_plot() {
        let svg = draw(&[], &[], CEILINGS);
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn axes_start_and_end_at_round_numbers() {
        let axis = Axis::around([3.0, 700.0].into_iter(), 0.0, 100.0);
        assert_eq!((axis.low, axis.high), (2.0, 1000.0));
        assert!(axis.at(2.0).abs() < 1e-9 && (axis.at(1000.0) - 100.0).abs() < 1e-9);
        assert_eq!(ticks(1.0, 20.0).collect::<Vec<_>>(), [1.0, 2.0, 5.0, 10.0, 20.0]);
    }
}
