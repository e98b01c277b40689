//! The few elements that pictures here are drawn with, as SVG text.

use std::fmt::Write;

/// The beginning of a picture on white; `</svg>` ends it.
pub(crate) fn begin(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"Helvetica, Arial, DejaVu Sans, sans-serif\" font-size=\"13\" fill=\"#222\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n"
    )
}

/// A line between two points, `x y x y`.
pub(crate) fn line(svg: &mut String, [a, b, c, d]: [f64; 4], style: &str) {
    let _ = writeln!(svg, "<line x1=\"{a:.1}\" y1=\"{b:.1}\" x2=\"{c:.1}\" y2=\"{d:.1}\" {style}/>");
}

/// Words, with an anchor of `start`, `middle` or `end` at a point.
pub(crate) fn text(svg: &mut String, [x, y]: [f64; 2], anchor: &str, style: &str, words: &str) {
    let words = escaped(words);
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" {style}>{words}</text>");
}

/// Words as an element may hold them. XML has no control characters: they become spaces.
pub(crate) fn escaped(words: &str) -> String {
    let words = words.replace(|c: char| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'), " ");
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stay_words() {
        assert_eq!(escaped("a<b> & c\n\u{1}d"), "a&lt;b&gt; &amp; c  d");
        let mut svg = begin(10.0, 20.0);
        text(&mut svg, [1.0, 2.25], "end", "", "<x>");
        line(&mut svg, [0.0, 1.0, 2.0, 3.0], "stroke=\"#000\"");
        assert!(svg.contains("viewBox=\"0 0 10 20\"") && svg.contains(">&lt;x&gt;</text>"), "{svg}");
    }
}
