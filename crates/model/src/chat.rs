//! Chat templates: how a model wants a conversation written out.
//!
//! Templates are Jinja2 written for Transformers' environment (`apply_chat_template`), whose settings, functions and filters
//! are given here: blocks are trimmed, loop controls and Python's string methods work, `tojson` is Python's `json.dumps`.
//! A template comes with a checkpoint and is not trusted: it reads nothing but its variables, and its work is bounded.

mod date;
mod json;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    thread,
};

use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context, syntax::SyntaxConfig, value::Kwargs};

use crate::{Error, Result};

/// What a template may do before it is taken to run for ever: about this many steps, and more for each message and for the
/// text. Templates of published models take a few hundred steps for a message.
const BASE_FUEL: u64 = 50_000;
const MESSAGE_FUEL: u64 = 2_000;
const BYTES_PER_FUEL: u64 = 4;

/// The stack that a template runs on. It can nest a list in a list once every few steps, and such a value is dropped and
/// compared recursively: the stack grows with the steps, so that it is always the steps that run out. Pages never touched
/// take no memory.
const BASE_STACK: usize = 4 << 20;
const STACK_PER_FUEL: usize = 512;

/// The special tokens that templates may name, as keys of `tokenizer_config.json`.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: "system", "user" or "assistant".
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".to_owned(), content: content.into() }
    }
}

/// How a written-out conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// With the beginning of the assistant's reply, for the model to continue (`add_generation_prompt`).
    Begin,
    /// With the last message.
    None,
}

/// The texts of the special tokens, by their keys in `tokenizer_config.json`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens(BTreeMap<&'static str, String>);

impl SpecialTokens {
    /// Reads them from `tokenizer_config.json`, where each is a string or an object with `content`; `path` is for errors.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if one is something else.
    pub fn from_config(config: &serde_json::Value, path: &Path) -> Result<Self> {
        let mut tokens = BTreeMap::new();
        for key in SPECIAL_TOKENS {
            let Some(value) = config.get(key).filter(|value| !value.is_null()) else { continue };
            let text = value.as_str().or_else(|| value.get("content")?.as_str()).ok_or_else(|| {
                fault(path, format!("{key} must be a string or an object with the string \"content\", got {value}"))
            })?;
            tokens.insert(key, text.to_owned());
        }
        Ok(Self(tokens))
    }

    /// The text of a token, by its key: `bos_token`, `eos_token`, ...
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    path: PathBuf,
}

impl ChatTemplate {
    /// Compiles a template; `path` is where it came from.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it is no Jinja2 template.
    pub fn new(path: &Path, source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|cause| failed(path, &cause))?);
        // Debugging would copy the variables into every error.
        environment.set_debug(false);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", |value: &Value, options: Kwargs| json::tojson(value, &options));
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", date::strftime_now);
        environment
            .add_template_owned(TEMPLATE, without_generation_tags(source))
            .map_err(|cause| failed(path, &cause))?;
        Ok(Self { environment, path: path.to_owned() })
    }

    /// The template in `tokenizer_config.json`, if there is one: a string, or a list of `{name, template}` of which the
    /// one named "default" is taken; `path` is for errors.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if `chat_template` is something else, has no default or is no Jinja2 template.
    pub fn from_config(path: &Path, config: &serde_json::Value) -> Result<Option<Self>> {
        let source = match config.get("chat_template") {
            None | Some(serde_json::Value::Null) => return Ok(None),
            Some(serde_json::Value::String(source)) => source,
            Some(serde_json::Value::Array(named)) => {
                let default = named.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"));
                match default.and_then(|entry| entry.get("template")) {
                    Some(serde_json::Value::String(source)) => source,
                    _ => return Err(fault(path, "chat_template is a list without one named \"default\"".to_owned())),
                }
            }
            Some(_) => {
                return Err(fault(path, "chat_template must be a string or a list of named templates".to_owned()));
            }
        };
        Self::new(path, source).map(Some)
    }

    /// Writes out a conversation.
    ///
    /// # Errors
    /// [`Error::Input`] if there are no messages or the template refuses them; [`Error::Tokenizer`] if the template fails
    /// or does not end.
    pub fn render(&self, messages: &[Message], special: &SpecialTokens, reply: Reply) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::Input("the conversation is empty: give at least one message".to_owned()));
        }
        let bytes: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        let fuel = BASE_FUEL + MESSAGE_FUEL * messages.len() as u64 + bytes as u64 / BYTES_PER_FUEL;
        let stack = BASE_STACK + fuel as usize * STACK_PER_FUEL;
        thread::scope(|scope| {
            let work = || self.render_bounded(messages, special, reply, fuel);
            let worker = thread::Builder::new().stack_size(stack).spawn_scoped(scope, work);
            let worker = worker.map_err(Error::io("start a thread to render the chat template of", &self.path))?;
            worker.join().unwrap_or_else(|_| Err(fault(&self.path, "the chat template cannot be rendered".to_owned())))
        })
    }

    fn render_bounded(&self, messages: &[Message], special: &SpecialTokens, reply: Reply, fuel: u64) -> Result<String> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let turns: Vec<Value> = messages
            .iter()
            .map(|turn| Value::from_pairs([("role", turn.role.as_str()), ("content", turn.content.as_str())]))
            .collect();
        let tokens = Value::from_pairs(special.0.iter().map(|(key, text)| (*key, text.as_str())));
        let variables = context! {
            messages => turns,
            tools => (),
            documents => (),
            add_generation_prompt => reply == Reply::Begin,
            ..tokens
        };
        let template = environment.get_template(TEMPLATE).map_err(|cause| failed(&self.path, &cause))?;
        template.render(variables).map_err(|cause| {
            if let Some(refusal) = refusal(&cause) {
                return Error::Input(format!("the chat template in {} refuses: {refusal}", self.path.display()));
            }
            if cause.kind() == ErrorKind::OutOfFuel {
                return fault(&self.path, "the chat template does more work than any conversation needs".to_owned());
            }
            failed(&self.path, &cause)
        })
    }
}

const TEMPLATE: &str = "chat_template";
/// Marks an error as one that the template raised on purpose.
const REFUSAL: &str = "raise_exception: ";

fn raise_exception(message: &str) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, format!("{REFUSAL}{message}")))
}

/// What `raise_exception` was called with, if it was; macros wrap the error.
fn refusal(error: &minijinja::Error) -> Option<String> {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(current) = cause {
        let detail = current.downcast_ref::<minijinja::Error>().and_then(minijinja::Error::detail);
        if let Some(message) = detail.and_then(|detail| detail.strip_prefix(REFUSAL)) {
            return Some(one_line(message));
        }
        cause = current.source();
    }
    None
}

/// Transformers adds a block `{% generation %}` around what the assistant says, to tell it apart in training. It writes
/// what is in it, like a condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    for (index, piece) in source.split("{%").enumerate() {
        if index > 0 {
            out.push_str("{%");
        }
        let tag = piece.split_once("%}").map(|(tag, _)| tag.trim_matches(['-', '+', ' ', '\t', '\n', '\r']));
        match tag {
            Some("generation") => out.push_str(&piece.replacen("generation", "if true", 1)),
            Some("endgeneration") => out.push_str(&piece.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(piece),
        }
    }
    out
}

fn failed(path: &Path, cause: &minijinja::Error) -> Error {
    fault(path, format!("the chat template fails: {}", one_line(&cause.to_string())))
}

fn fault(path: &Path, problem: String) -> Error {
    Error::Tokenizer { path: path.to_owned(), problem }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
