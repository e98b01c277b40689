//! Text to token ids and back: `tokenizer.json` and `tokenizer_config.json`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{
    Config, Error, Result,
    chat::{ChatTemplate, Message, Reply, SpecialTokens},
    init::byte_level,
};

/// A checkpoint's tokenizer and, if it has one, its chat template.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    /// The id to put before a text that does not begin with it.
    bos: Option<u32>,
    special: SpecialTokens,
    chat: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, where they exist, `tokenizer_config.json` and `chat_template.jinja` (which goes before
    /// the configuration's `chat_template`) from a checkpoint's folder.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::Tokenizer`] if one does not hold what it should or if
    /// `add_bos_token` asks for a token that there is not.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = fs::read(&path).map_err(Error::io("read", &path))?;
        let config_path = dir.join("tokenizer_config.json");
        let config = match read_optional(&config_path)? {
            Some(text) => serde_json::from_str::<Value>(&text)
                .map_err(|cause| fault(&config_path, "is not valid JSON", &cause))?,
            None => Value::Null,
        };
        let template_path = dir.join("chat_template.jinja");
        let template = match read_optional(&template_path)? {
            Some(source) => Some(ChatTemplate::new(&template_path, &source)?),
            None => None,
        };
        Self::new(path, &bytes, &config_path, &config, template)
    }

    /// The tokenizer that [`init`](crate::init::init) writes: one token a byte, for models that have none of their own.
    ///
    /// # Errors
    /// [`Error::Input`] if the vocabulary has no room for 256 bytes and two marks.
    pub fn byte_level(config: &Config) -> Result<Self> {
        let (tokenizer, settings) = byte_level(config).ok_or_else(|| {
            Error::Input(format!("a vocabulary of {} has no room for a tokenizer of bytes", config.vocab_size))
        })?;
        let path = PathBuf::from("tokenizer of bytes");
        Self::new(path.clone(), tokenizer.to_string().as_bytes(), &path, &settings, None)
    }

    fn new(
        path: PathBuf,
        bytes: &[u8],
        config_path: &Path,
        config: &Value,
        template: Option<ChatTemplate>,
    ) -> Result<Self> {
        let mut inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|cause| fault(&path, "is no tokenizer", &*cause))?;
        // What a training script left in the file: prompts are neither cut nor filled up.
        inner.with_truncation(None).map_err(|cause| fault(&path, "has a truncation that cannot be undone", &*cause))?;
        inner.with_padding(None);
        let special = SpecialTokens::from_config(config, config_path)?;
        let bos = begin_token(config, config_path, &special, &inner)?;
        let chat = match template {
            Some(template) => Some(template),
            None => ChatTemplate::from_config(config_path, config)?,
        };
        Ok(Self { inner, path, bos, special, chat })
    }

    /// The ids of a text, with the special tokens that the tokenizer's post-processor adds, and begun by the BOS token if
    /// `add_bos_token` is true, once. (Transformers 5 leaves it all to the post-processor; Transformers 4 went by
    /// `add_bos_token` for Llama's tokenizer class, and there are files that say it only there.)
    /// Special tokens written out in the text are recognised, as in Transformers.
    ///
    /// # Errors
    /// [`Error::Input`] if the text is empty or has no tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.is_empty() {
            return Err(Error::Input("the prompt is empty: give it at least one character".to_owned()));
        }
        let mut ids = self.ids(text, true)?;
        if let Some(bos) = self.bos
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// The ids of a conversation, written out by the model's chat template up to where the assistant's reply begins.
    /// The template writes the special tokens itself, so none are added.
    ///
    /// # Errors
    /// [`Error::Input`] if the model has no chat template, there are no messages or the template refuses them;
    /// [`Error::Tokenizer`] if the template fails.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.ids(&self.render_chat(messages, Reply::Begin)?, false)
    }

    /// A conversation as the model's chat template writes it.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode_chat`].
    pub fn render_chat(&self, messages: &[Message], reply: Reply) -> Result<String> {
        let Some(chat) = &self.chat else {
            let dir = self.path.parent().unwrap_or(&self.path).display();
            return Err(Error::Input(format!(
                "the model in {dir} has no chat template (neither chat_template.jinja nor chat_template in \
                 tokenizer_config.json): leave out --chat and give the prompt as plain text"
            )));
        };
        chat.render(messages, &self.special, reply)
    }

    /// The text of some ids, without special tokens; ids that the tokenizer does not know have no text. Bytes that are no
    /// UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|cause| fault(&self.path, "cannot decode", &*cause))
    }

    /// Whether an id can have text: the tokenizer knows it, and it is no special token.
    pub fn has_text(&self, id: u32) -> bool {
        let token = self.inner.id_to_token(id);
        token.is_some_and(|token| !self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// The number of tokens, added ones included. A model may have more rows, never fewer.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Whether there is a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|cause| fault(&self.path, "cannot encode the prompt", &*cause))?;
        if encoding.is_empty() {
            return Err(Error::Input(format!(
                "the prompt has no tokens: {} leaves nothing of {:?}",
                self.path.display(),
                text.chars().take(40).collect::<String>()
            )));
        }
        Ok(encoding.get_ids().to_vec())
    }
}

/// The BOS token's id, if `add_bos_token` asks for it.
fn begin_token(
    config: &Value,
    path: &Path,
    special: &SpecialTokens,
    inner: &tokenizers::Tokenizer,
) -> Result<Option<u32>> {
    match config.get("add_bos_token") {
        None | Some(Value::Null | Value::Bool(false)) => Ok(None),
        Some(Value::Bool(true)) => {
            let token = special.get("bos_token").ok_or_else(|| Error::Tokenizer {
                path: path.to_owned(),
                problem: "add_bos_token is true, but there is no bos_token".to_owned(),
            })?;
            let id = inner.token_to_id(token).ok_or_else(|| Error::Tokenizer {
                path: path.to_owned(),
                problem: format!("bos_token is {token:?}, which tokenizer.json does not have"),
            })?;
            Ok(Some(id))
        }
        Some(other) => Err(Error::Tokenizer {
            path: path.to_owned(),
            problem: format!("add_bos_token must be true or false, got {other}"),
        }),
    }
}

/// The text of a file, if it exists.
fn read_optional(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(Error::io("read", path)(cause)),
    }
}

/// A fault of a file, with its cause on the same line.
fn fault(path: &Path, problem: &str, cause: &dyn std::error::Error) -> Error {
    let cause = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    Error::Tokenizer { path: path.to_owned(), problem: format!("{problem}: {cause}") }
}
