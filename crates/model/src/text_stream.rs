//! Tokens to text as they come.
//!
//! A token of a byte-level vocabulary may end within a character, and a stop string may be spread over tokens. So text is
//! held back until it can no longer change: what was shown never does.

use crate::{Error, Result, Tokenizer};

/// What an undecodable byte looks like, and a character whose rest is still to come.
const UNDECODED: char = char::REPLACEMENT_CHARACTER;
/// Bytes of a character's unfinished beginning; a decoder may show each as one [`UNDECODED`].
const MOST_UNFINISHED: usize = 3;

/// The text of one sequence of tokens, piece by piece, cut where a stop string begins.
///
/// The pieces together are [`Tokenizer::decode`] of all tokens for a byte-level tokenizer, whatever the tokens; for one
/// with byte fallback, wherever the bytes are valid UTF-8 (there, one bad byte changes the text of its neighbours too).
#[derive(Debug)]
pub struct TextStream<'a> {
    detokenizer: Detokenizer<'a>,
    stop: StopStrings<'a>,
}

impl<'a> TextStream<'a> {
    /// Starts a text that ends before the first of the `stop` strings.
    ///
    /// # Errors
    /// [`Error::Input`] if a stop string is empty.
    pub fn new(tokenizer: &'a Tokenizer, stop: &'a [String]) -> Result<Self> {
        if stop.iter().any(String::is_empty) {
            return Err(Error::Input("a stop string is empty: give at least one character, or none at all".to_owned()));
        }
        Ok(Self { detokenizer: Detokenizer::new(tokenizer), stop: StopStrings::new(stop) })
    }

    /// Adds a token and returns the text that is now certain; often none. Nothing follows once a stop string was met.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let text = self.detokenizer.push(id)?;
        Ok(self.stop.push(&text))
    }

    /// Ends the text and returns what was held back.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder fails.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.detokenizer.advance(Held::Nothing)?;
        let mut piece = self.stop.push(&text);
        piece.push_str(&self.stop.finish());
        Ok(piece)
    }

    /// Whether a stop string was met.
    pub fn stopped(&self) -> bool {
        self.stop.met
    }
}

/// Whether the end of the text may still change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Held {
    Unfinished,
    Nothing,
}

/// Tokens to text that never ends within a character.
#[derive(Debug)]
struct Detokenizer<'a> {
    tokenizer: &'a Tokenizer,
    /// The last tokens whose text was shown whole. The next are decoded after them, since a decoder may treat the first
    /// token of a text differently (Llama's strips its space).
    context: Vec<u32>,
    context_text: String,
    /// The tokens since.
    pending: Vec<u32>,
    /// Bytes of their text that were shown.
    shown: usize,
}

impl<'a> Detokenizer<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, context: Vec::new(), context_text: String::new(), pending: Vec::new(), shown: 0 }
    }

    fn push(&mut self, id: u32) -> Result<String> {
        if !self.tokenizer.has_text(id) {
            return Ok(String::new());
        }
        self.pending.push(id);
        self.advance(Held::Unfinished)
    }

    fn advance(&mut self, held: Held) -> Result<String> {
        if self.pending.is_empty() {
            return Ok(String::new());
        }
        let all = self.tokenizer.decode(&[self.context.as_slice(), &self.pending].concat())?;
        let text = match all.strip_prefix(&self.context_text) {
            Some(text) => text.to_owned(),
            // Byte fallback: an unfinished character undoes the bytes before it, for as long as it is unfinished.
            None => self.tokenizer.decode(&self.pending)?,
        };
        let certain = match held {
            Held::Unfinished => without_unfinished(&text),
            Held::Nothing => text.as_str(),
        };
        let piece = certain.get(self.shown..).unwrap_or_default().to_owned();
        self.shown = self.shown.max(certain.len());
        if certain.len() == text.len() && !text.is_empty() {
            self.context = std::mem::take(&mut self.pending);
            self.context_text = self.tokenizer.decode(&self.context)?;
            self.shown = 0;
        }
        Ok(piece)
    }
}

/// The text without what may be a character's beginning.
fn without_unfinished(text: &str) -> &str {
    let mut certain = text;
    for _ in 0..MOST_UNFINISHED {
        certain = certain.strip_suffix(UNDECODED).unwrap_or(certain);
    }
    certain
}

/// Text up to the stop string that is complete first; of several that end together, the longest. This does not depend on
/// how the text is cut into pieces.
#[derive(Debug)]
struct StopStrings<'a> {
    stop: &'a [String],
    /// The end of the text, which may be the beginning of a stop string.
    held: String,
    met: bool,
}

impl<'a> StopStrings<'a> {
    fn new(stop: &'a [String]) -> Self {
        Self { stop, held: String::new(), met: false }
    }

    fn push(&mut self, text: &str) -> String {
        if self.met {
            return String::new();
        }
        self.held.push_str(text);
        let found = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        if let Some((_, at)) = found.min() {
            self.met = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = self.held.split_off(self.held.len() - self.longest_beginning());
        std::mem::replace(&mut self.held, keep)
    }

    fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of the held text that begin a stop string.
    fn longest_beginning(&self) -> usize {
        let beginnings = self.stop.iter().flat_map(|stop| stop.char_indices().map(move |(end, _)| &stop[..end]));
        beginnings.filter(|beginning| self.held.ends_with(beginning)).map(str::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::StopStrings;

    /// The definition, by trying every end.
    fn cut<'t>(text: &'t str, stop: &[String]) -> Option<&'t str> {
        let ends = (1..=text.len()).filter(|&end| text.is_char_boundary(end));
        let mut met = ends.filter_map(|end| {
            let longest = stop.iter().filter(|stop| text[..end].ends_with(stop.as_str())).map(String::len).max()?;
            Some(&text[..end - longest])
        });
        met.next()
    }

    proptest! {
        #[test]
        fn the_cut_does_not_depend_on_the_pieces(
            pieces in prop::collection::vec("[abé]{0,3}", 0..12),
            stop in prop::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let text = pieces.concat();
            let mut strings = StopStrings::new(&stop);
            let mut shown = String::new();
            for piece in &pieces {
                shown.push_str(&strings.push(piece));
                if !strings.met {
                    let may_begin = |end: usize| stop.iter().any(|s| s.starts_with(&strings.held) && s.len() > end);
                    prop_assert!(strings.held.is_empty() || may_begin(strings.held.len()));
                }
            }
            shown.push_str(&strings.finish());
            let expected = cut(&text, &stop);
            prop_assert_eq!(strings.met, expected.is_some());
            prop_assert_eq!(shown, expected.unwrap_or(&text));
        }
    }
}
