//! The texts that a command is given.

use crate::{failure::Failure, output};
use anabranch_model::Error;
use std::{
    fs,
    io::{self, IsTerminal, Read},
    path::PathBuf,
};

/// What to read, as every command that takes text asks.
#[derive(clap::Args)]
pub(crate) struct Prompts {
    /// Text for the model; may be given several times [default: standard input]
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file")]
    prompt: Vec<String>,
    /// File to read: `generate` takes each of its lines for a prompt, `route` all of it for one text
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
}

impl Prompts {
    /// The prompts: from the options, a file's lines, or standard input; never empty.
    pub(crate) fn lines(&self) -> Result<Vec<String>, Failure> {
        let Some(path) = &self.prompt_file else { return self.texts() };
        let text = self.texts()?.concat();
        let lines: Vec<String> = text.split('\n').map(|line| without_return(line).to_owned()).collect();
        match lines.iter().position(String::is_empty) {
            Some(empty) if lines.len() > 1 => {
                let (name, line) = (path.display(), empty + 1);
                Err(Failure::Failed(format!("{name}: line {line} is empty, and each line is a prompt")))
            }
            _ => Ok(lines),
        }
    }

    /// The texts: from the options, a whole file, or standard input; never empty.
    pub(crate) fn texts(&self) -> Result<Vec<String>, Failure> {
        let texts = match &self.prompt_file {
            Some(path) => {
                let bytes = fs::read(path).map_err(Error::io("read", path))?;
                vec![text(&path.display().to_string(), bytes)?]
            }
            None if self.prompt.is_empty() => vec![text("standard input", read_stdin()?)?],
            None => self.prompt.clone(),
        };
        if texts.iter().any(String::is_empty) {
            return Err(Failure::Failed(
                "the prompt is empty; give text with --prompt, --prompt-file or on standard input".to_owned(),
            ));
        }
        Ok(texts)
    }

    /// What the texts are, for a heading.
    pub(crate) fn name(&self) -> String {
        let file = self.prompt_file.as_deref().map(|path| path.file_name().unwrap_or(path.as_os_str()));
        match (file, self.prompt.len()) {
            (Some(file), _) => file.to_string_lossy().into_owned(),
            (None, 0) => "standard input".to_owned(),
            (None, 1) => "one prompt".to_owned(),
            (None, count) => format!("{count} prompts"),
        }
    }
}

fn read_stdin() -> Result<Vec<u8>, Failure> {
    let mut stdin = io::stdin().lock();
    tracing::debug!("reading the prompt from standard input");
    if stdin.is_terminal() {
        output::complain("Type the prompt, then Ctrl-D at the beginning of a line.");
    }
    let mut bytes = Vec::new();
    stdin.read_to_end(&mut bytes).map_err(|error| Failure::Failed(format!("cannot read standard input: {error}")))?;
    Ok(bytes)
}

/// A line without what some editors put before its end.
fn without_return(line: &str) -> &str {
    line.strip_suffix('\r').unwrap_or(line)
}

/// The text of a file, without the line end that editors put after the last line.
fn text(source: &str, bytes: Vec<u8>) -> Result<String, Failure> {
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let byte = error.as_bytes()[at];
        Failure::Failed(format!("{source} is not UTF-8 text: byte {byte:#04x} at offset {at} is out of place"))
    })?;
    if text.ends_with('\n') {
        text.pop();
        text.truncate(without_return(&text).len());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_end_goes() {
        let stripped = |bytes: &[u8]| text("file", bytes.to_vec()).unwrap();
        assert_eq!(stripped(b"a\nb\n"), "a\nb");
        assert_eq!(stripped(b"a\r\n"), "a");
        assert_eq!(stripped(b"a\n\n"), "a\n");
        assert_eq!(stripped(b"a\r"), "a\r");
        assert_eq!(stripped(b"\n"), "");
    }

    #[test]
    fn bytes_that_are_no_text() {
        let failure = text("p.txt", b"ab\xff".to_vec()).unwrap_err().to_string();
        assert_eq!(failure, "p.txt is not UTF-8 text: byte 0xff at offset 2 is out of place");
    }
}
