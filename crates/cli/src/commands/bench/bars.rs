//! Decoding speed beside its floor, as SVG: a pair of bars a point, one below the other.

use super::model::Point;
use crate::svg;
use std::fmt::Write;

const WIDTH: f64 = 900.0;
/// Where bars begin and end.
const LEFT: f64 = 330.0;
const RIGHT: f64 = 780.0;
const TOP: f64 = 74.0;
const ROW: f64 = 26.0;
const BAR: f64 = 16.0;
const FLOOR: &str = "#e6e6e6";
const WITH_CACHE: &str = "#bdbdbd";
const MEASURED: &str = "#0072b2";

/// Each point's speed over its own floor, which ends all bars at the same place.
pub(super) fn draw(points: &[Point]) -> String {
    let decode: Vec<(&Point, f64)> =
        points.iter().filter_map(|point| Some((point, point.floor_tokens_per_second?))).collect();
    let height = TOP + ROW * decode.len() as f64 + 40.0;
    let mut picture = svg::begin(WIDTH, height);
    let device = decode.first().map_or("", |(point, _)| point.device.as_str());
    let title = format!("Decoding, bf16, {device}");
    svg::text(&mut picture, [24.0, 30.0], "start", "font-size=\"17\" font-weight=\"bold\"", &title);
    let legend = "tokens a second; grey: what reading the weights once a step at 4.6 TB/s allows, darker: the keys and values, too";
    svg::text(&mut picture, [24.0, 52.0], "start", "fill=\"#555\"", legend);
    let mut model = "";
    for (row, (point, floor)) in decode.iter().enumerate() {
        let y = TOP + ROW * row as f64;
        let share = point.tokens_per_second / floor;
        let bytes = (point.weight_bytes + point.cache_bytes) as f64;
        let with_cache = point.weight_bytes as f64 / bytes;
        let middle = y + BAR * 0.78;
        if model != point.model {
            model = &point.model;
            svg::text(&mut picture, [24.0, middle], "start", "font-weight=\"bold\"", model);
        }
        let label = format!("batch {}, context {}", point.batch, point.context);
        svg::text(&mut picture, [LEFT - 10.0, middle], "end", "", &label);
        for (share, colour) in [(1.0, FLOOR), (with_cache, WITH_CACHE), (share.min(1.0), MEASURED)] {
            let width = (RIGHT - LEFT) * share;
            let _ = writeln!(
                picture,
                "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>"
            );
        }
        let value = format!("{:.0}", point.tokens_per_second);
        svg::text(&mut picture, [LEFT + 6.0, middle], "start", "fill=\"#fff\" font-weight=\"bold\"", &value);
        let of = format!("{:.0}% of {floor:.0}", 100.0 * share);
        svg::text(&mut picture, [RIGHT + 8.0, middle], "start", "", &of);
    }
    picture.push_str("</svg>\n");
    picture
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_decoding_point_has_its_bars() {
        let point = |model: &str, phase, batch| Point {
            model: model.to_owned(),
            phase,
            batch,
            context: 128,
            ms_median: 2.0,
            ms_min: 1.9,
            tokens_per_second: 500.0 * batch as f64,
            floor_tokens_per_second: (phase == "decode").then_some(800.0 * batch as f64),
            cache_bytes: 100,
            weight_bytes: 300,
            peak_bytes: None,
            device: "a <GPU>".to_owned(),
        };
        let points = [point("one", "decode", 1), point("one", "decode", 8), point("two & more", "prefill", 1)];
        let svg = draw(&points);
        assert_eq!(svg.matches("of 800").count() + svg.matches("of 6400").count(), 2);
        assert_eq!(svg.matches(MEASURED).count(), 2);
        // Three quarters of the bar are left where a quarter of the bytes is the cache's.
        let left = format!("width=\"{:.1}\" height=\"{BAR}\" fill=\"{WITH_CACHE}\"", 0.75 * (RIGHT - LEFT));
        assert_eq!(svg.matches(&left).count(), 2);
        assert!(svg.contains("a &lt;GPU&gt;") && !svg.contains("two &"));
    }
}
