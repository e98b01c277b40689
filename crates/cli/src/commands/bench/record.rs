//! What a measured point is written down as.

use super::shapes::Shape;
use crate::{failure::Failure, units};
use serde::{Deserialize, Serialize};
use std::{fs, path::Path};

/// FLOP/s and bytes a second that the floor is computed with: what an H200 does at best.
const FLOPS: f64 = 790e12;
const BYTES: f64 = 4.6e12;

/// One point, as it stands in JSON. Times are microseconds, of the smaller of eager calls and graph launches.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Record {
    pub(super) shape: String,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) experts: usize,
    pub(super) topk: usize,
    pub(super) shared: usize,
    pub(super) tokens: usize,
    pub(super) dtype: &'static str,
    pub(super) us_median: f64,
    pub(super) us_min: f64,
    pub(super) us_p90: f64,
    /// Routed experts that got a token.
    pub(super) experts_hit: usize,
    pub(super) tflops: f64,
    pub(super) weight_gbps: f64,
    pub(super) floor_us: f64,
    pub(super) rel_error: f64,
    /// `graph` or `eager`: which was smaller.
    pub(super) launch: &'static str,
    pub(super) us_eager: Option<f64>,
    pub(super) us_graph: f64,
    pub(super) samples: usize,
    pub(super) routing: &'static str,
    /// `logits` or `hidden`.
    pub(super) from: &'static str,
    /// `file`, `seed` or `gate`.
    pub(super) logits: &'static str,
    /// The path, tiles, blocks and launches.
    pub(super) chosen: String,
    pub(super) steady: bool,
    /// Layers of a graph; times are of one.
    pub(super) layers: usize,
    /// Layers' weights that fitted into memory.
    pub(super) weight_sets: usize,
    pub(super) device: String,
}

/// Samples of one kind of launch.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Times(Vec<f64>);

impl Times {
    /// At least one sample, in microseconds.
    pub(super) fn new(mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    pub(super) fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        if self.0.len().is_multiple_of(2) { f64::midpoint(self.0[middle - 1], self.0[middle]) } else { self.0[middle] }
    }

    pub(super) fn min(&self) -> f64 {
        self.0[0]
    }

    pub(super) fn p90(&self) -> f64 {
        self.0[(self.0.len() * 9).div_ceil(10) - 1]
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}

/// FLOPs of a layer.
pub(super) fn flops(shape: &Shape, shared: usize, tokens: usize) -> f64 {
    2.0 * (tokens * (shape.topk + shared)) as f64 * shape.expert() as f64
}

/// Bytes of the weights of experts hit.
pub(super) fn weight_bytes(shape: &Shape, experts_hit: usize) -> f64 {
    2.0 * experts_hit as f64 * shape.expert() as f64
}

/// Bytes that must move: weights once, x and the output once.
pub(super) fn bytes(shape: &Shape, experts_hit: usize, tokens: usize) -> f64 {
    weight_bytes(shape, experts_hit) + 4.0 * tokens as f64 * shape.hidden as f64
}

/// The least time that the chip could take, in microseconds.
pub(super) fn floor_us(shape: &Shape, shared: usize, experts_hit: usize, tokens: usize) -> f64 {
    let arithmetic = flops(shape, shared, tokens) / FLOPS;
    arithmetic.max(bytes(shape, experts_hit + shared, tokens) / BYTES) * 1e6
}

impl Record {
    /// FLOP per byte, and TFLOP/s: its place in a roofline.
    pub(super) fn place(&self) -> (f64, f64) {
        let shape = Shape {
            name: String::new(),
            hidden: self.hidden,
            intermediate: self.intermediate,
            experts: self.experts,
            topk: self.topk,
            tokens: Vec::new(),
        };
        let bytes = bytes(&shape, self.experts_hit + self.shared, self.tokens);
        (flops(&shape, self.shared, self.tokens) / bytes, self.tflops)
    }
}

/// A point of someone else's, as `benches/peers.py` writes it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Peer {
    #[serde(rename = "peer")]
    pub(super) name: String,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) experts: usize,
    pub(super) topk: usize,
    pub(super) tokens: usize,
    pub(super) us_median: f64,
}

/// Reads points of others: a JSON array, or an object whose `points` are one.
pub(super) fn read_peers(path: &Path) -> Result<Vec<Peer>, Failure> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum File {
        Plain(Vec<Peer>),
        Described { points: Vec<Peer> },
    }
    let shown = path.display();
    let text = fs::read_to_string(path).map_err(|error| Failure::Failed(format!("cannot read {shown}: {error}")))?;
    match serde_json::from_str(&text) {
        Ok(File::Plain(points) | File::Described { points }) => Ok(points),
        Err(_) => Err(Failure::Failed(format!(
            "{shown} must be a JSON array of points, each with peer, hidden, intermediate, experts, topk, tokens and us_median"
        ))),
    }
}

/// The points of one shape, for people.
pub(super) fn table(records: &[Record]) -> String {
    let head = [
        "T",
        "hit",
        "median us",
        "min",
        "p90",
        "launch",
        "eager",
        "graph",
        "TFLOP/s",
        "GB/s",
        "floor us",
        "x floor",
        "error",
        "chosen",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    rows.extend(records.iter().map(|record| {
        let eager = record.us_eager.map_or_else(|| "-".to_owned(), time);
        vec![
            units::grouped(record.tokens as u64),
            record.experts_hit.to_string(),
            time(record.us_median),
            time(record.us_min),
            time(record.us_p90),
            record.launch.to_owned(),
            eager,
            time(record.us_graph),
            format!("{:.1}", record.tflops),
            format!("{:.0}", record.weight_gbps),
            time(record.floor_us),
            format!("{:.2}", record.us_median / record.floor_us),
            format!("{:.1e}", record.rel_error),
            record.chosen.clone(),
        ]
    }));
    units::table(&rows, &[0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12])
}

/// Microseconds with one digit behind the point, or none where they are thousands.
fn time(us: f64) -> String {
    if us >= 9999.5 { units::grouped(us.round() as u64) } else { format!("{us:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::shapes::Preset;

    #[test]
    fn statistics() {
        let times = Times::new(vec![3.0, 1.0, 2.0]);
        assert_eq!((times.median(), times.min(), times.p90(), times.len()), (2.0, 1.0, 3.0, 3));
        let times = Times::new((1..=20).map(f64::from).collect());
        assert_eq!((times.median(), times.p90()), (10.5, 18.0));
        assert_eq!(Times::new(vec![7.0]).median(), 7.0);
    }

    /// Against the published table of peers.
    #[test]
    fn floors_are_the_published_ones() {
        for (preset, tokens, hit, floor) in [
            (Preset::Dsmoe16b, 1, 6, 22.6),
            (Preset::Dsmoe16b, 4096, 64, 538.2),
            (Preset::Dsv3, 64, 224, 4289.5),
            (Preset::Dsv3, 16_384, 256, 14_613.8),
            (Preset::Mixtral, 512, 8, 614.6),
            (Preset::Qwen3, 8, 49, 100.5),
            (Preset::Sonic4k, 32_768, 128, 8350.7),
        ] {
            let shape = &preset.shapes()[0];
            assert!((floor_us(shape, 0, hit, tokens) - floor).abs() < 0.06, "{preset:?} {tokens}");
        }
    }
}
