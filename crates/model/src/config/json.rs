//! Typed access to a parsed `config.json`, with errors that name the field.

use std::{fmt::Display, ops::RangeInclusive, path::Path};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Largest file that is read as JSON: a weight file given by mistake is refused instead of read into memory.
const MAX_FILE: u64 = 16 << 20;

/// Reads a whole JSON file.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Config`] if it is too large for JSON or not UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let length = std::fs::metadata(path).map_err(Error::io("read", path))?.len();
    let config_error = |problem: String| Error::Config { path: path.to_owned(), problem };
    if length > MAX_FILE {
        return Err(config_error(format!("expected a JSON file of at most {MAX_FILE} bytes, got {length} bytes")));
    }
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    String::from_utf8(bytes).map_err(|error| {
        config_error(format!("expected UTF-8 text, got an invalid byte at {}", error.utf8_error().valid_up_to()))
    })
}

/// Parses the text of a JSON file whose top level is an object.
///
/// # Errors
/// [`Error::Config`] with line and column.
pub(crate) fn parse(path: &Path, text: &str) -> Result<Map<String, Value>> {
    let config_error = |problem: String| Error::Config { path: path.to_owned(), problem };
    match serde_json::from_str(text) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(config_error(format!("expected a JSON object, got {}", describe(&other)))),
        Err(error) => Err(config_error(format!("not valid JSON: {error}"))),
    }
}

/// A JSON object of a configuration. A field that is `null` counts as absent, as it does for Transformers.
#[derive(Clone, Copy)]
pub(crate) struct Object<'a> {
    path: &'a Path,
    /// The field that holds this object, with a dot after it; empty at the top level.
    prefix: &'static str,
    fields: &'a Map<String, Value>,
}

impl<'a> Object<'a> {
    /// The top level of a file.
    pub(crate) fn new(path: &'a Path, fields: &'a Map<String, Value>) -> Self {
        Self { path, prefix: "", fields }
    }

    /// A field's value, unless it is absent or `null`.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// An error in this file.
    pub(crate) fn error(&self, problem: impl Display) -> Error {
        Error::Config { path: self.path.to_owned(), problem: problem.to_string() }
    }

    /// The error of a field that holds something else than `expected`.
    pub(crate) fn wrong(&self, key: &str, expected: impl Display, got: &Value) -> Error {
        self.error(format!("{}{key} must be {expected}, got {}", self.prefix, describe(got)))
    }

    /// The error of a field that is needed and absent.
    pub(crate) fn missing(&self, key: &str, expected: impl Display) -> Error {
        self.error(format!("{}{key} is missing; it must be {expected}", self.prefix))
    }

    /// A whole number in `range`, if the field is there.
    pub(crate) fn optional_size(&self, key: &str, range: &RangeInclusive<usize>) -> Result<Option<usize>> {
        self.get(key).map(|value| self.size_of(key, value, range)).transpose()
    }

    /// A whole number in `range`.
    pub(crate) fn size(&self, key: &str, range: RangeInclusive<usize>) -> Result<usize> {
        self.optional_size(key, &range)?.ok_or_else(|| self.missing(key, whole_number(&range)))
    }

    /// The whole numbers of a list; empty if the field is absent.
    pub(crate) fn sizes(&self, key: &str, range: &RangeInclusive<usize>) -> Result<Vec<usize>> {
        match self.get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(values)) => values.iter().map(|value| self.size_of(key, value, range)).collect(),
            Some(other) => Err(self.wrong(key, "a list of whole numbers", other)),
        }
    }

    fn size_of(&self, key: &str, value: &Value, range: &RangeInclusive<usize>) -> Result<usize> {
        // Some tools write sizes as 2048.0; every range ends far below 2^53, where float64 is exact.
        let whole = value
            .as_u64()
            .or_else(|| value.as_f64().filter(|number| number.fract() == 0.0 && *number >= 0.0).map(|n| n as u64))
            .and_then(|number| usize::try_from(number).ok());
        whole.filter(|number| range.contains(number)).ok_or_else(|| self.wrong(key, whole_number(range), value))
    }

    /// A finite number, if the field is there.
    pub(crate) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|number| number.is_finite());
        number.map(Some).ok_or_else(|| self.wrong(key, "a number", value))
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str) -> Result<f64> {
        self.optional_number(key)?.ok_or_else(|| self.missing(key, "a number"))
    }

    /// A finite number above zero that float32 can hold.
    pub(crate) fn positive(&self, key: &str) -> Result<f32> {
        let number = self.number(key)? as f32;
        if number.is_finite() && number > 0.0 {
            return Ok(number);
        }
        Err(self.wrong(key, "a positive number in float32's range", &self.fields[key]))
    }

    /// True or false, if the field is there.
    pub(crate) fn optional_flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, "true or false", value))
    }

    /// True or false, with a default.
    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.optional_flag(key)?.unwrap_or(default))
    }

    /// True or false.
    pub(crate) fn flag(&self, key: &str) -> Result<bool> {
        self.optional_flag(key)?.ok_or_else(|| self.missing(key, "true or false"))
    }

    /// A string, if the field is there.
    pub(crate) fn optional_text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string", value))
    }

    /// Refuses a field that is there and holds a string other than those `supported`.
    pub(crate) fn expect_text(&self, key: &str, supported: &[&str]) -> Result<()> {
        match self.get(key) {
            None => Ok(()),
            Some(value) if value.as_str().is_some_and(|text| supported.contains(&text)) => Ok(()),
            Some(value) => Err(self.wrong(key, quoted(supported), value)),
        }
    }

    /// A nested object, if the field is there.
    pub(crate) fn object(&self, key: &'static str, prefix: &'static str) -> Result<Option<Object<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Object { path: self.path, prefix, fields })),
            Some(other) => Err(self.wrong(key, "an object", other)),
        }
    }
}

fn whole_number(range: &RangeInclusive<usize>) -> String {
    format!("a whole number from {} to {}", range.start(), range.end())
}

/// `"a", "b" or "c"`.
pub(crate) fn quoted(texts: &[&str]) -> String {
    let quoted: Vec<_> = texts.iter().map(|text| format!("{text:?}")).collect();
    match quoted.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
        None => String::new(),
    }
}

/// A value as an error shows it: its text, shortened, and its type where the text does not tell.
fn describe(value: &Value) -> String {
    const SHOWN: usize = 48;
    match value {
        Value::Array(values) => format!("a list of {}", values.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.chars().count() > SHOWN => {
            format!("the string {:?}...", text.chars().take(SHOWN).collect::<String>())
        }
        Value::String(text) => format!("the string {text:?}"),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str, read: impl Fn(&Object<'_>) -> Result<usize>) -> String {
        let path = Path::new("config.json");
        let fields = parse(path, text).unwrap();
        read(&Object::new(path, &fields)).unwrap_err().to_string()
    }

    #[test]
    fn sizes_name_field_expectation_and_value() {
        let size = |object: &Object<'_>| object.size("width", 1..=100);
        assert_eq!(
            message(r#"{"width": "64"}"#, size),
            r#"config.json: width must be a whole number from 1 to 100, got the string "64""#
        );
        assert_eq!(
            message(r#"{"width": -1}"#, size),
            "config.json: width must be a whole number from 1 to 100, got -1"
        );
        assert!(message(r#"{"width": 2.5}"#, size).ends_with("got 2.5"));
        assert!(message(r#"{"width": 1e300}"#, size).ends_with("got 1e+300"));
        assert!(message(r#"{"width": [1]}"#, size).ends_with("got a list of 1"));
        assert!(message(r#"{"width": null}"#, size).contains("width is missing"));
    }

    #[test]
    fn whole_floats_are_sizes() {
        let path = Path::new("config.json");
        let fields = parse(path, r#"{"width": 64.0}"#).unwrap();
        assert_eq!(Object::new(path, &fields).size("width", 1..=100).unwrap(), 64);
    }

    #[test]
    fn long_strings_are_cut_at_a_character() {
        let text = format!(r#"{{"width": "{}"}}"#, "ü".repeat(500));
        assert!(message(&text, |object| object.size("width", 1..=100)).len() < 250);
    }
}
