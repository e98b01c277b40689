//! Bars on stderr while something long goes on, where somebody watches: without a terminal nothing is shown.

use indicatif::{ProgressBar, ProgressStyle};

/// Runs `work`, which tells how many of how many layers it has loaded.
pub(crate) fn loading<T>(work: impl FnOnce(&mut dyn FnMut(usize, usize)) -> T) -> T {
    shown("loading {bar:30} {pos}/{len} layers", |bar| work(&mut |done, of| bar(done as u64, of as u64)))
}

/// Runs `work`, which tells how many of how many bytes it has written.
pub(crate) fn writing<T>(work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    shown("writing {bar:30} {bytes}/{total_bytes}, {eta} left", work)
}

/// Runs `work`, which tells how many of how many tokens it has read.
pub(crate) fn reading<T>(work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    shown("reading {bar:30} {pos}/{len} tokens, {eta} left", work)
}

fn shown<T>(template: &str, work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    // It draws to stderr, and only if that is a terminal.
    let bar = ProgressBar::no_length();
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    let result = work(&mut |done, of| {
        bar.set_length(of);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    result
}
