//! One module per subcommand: its options, and what it does.

pub(crate) mod bench;
pub(crate) mod doctor;
pub(crate) mod generate;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod logits;
pub(crate) mod route;

/// Parses a count of which zero makes no sense.
fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&value| value >= 1).ok_or_else(|| "expected a whole number, at least 1".to_owned())
}
