//! A byte-level tokenizer for checkpoints that have no text to learn one from.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::Config;

/// Tokens that a text needs: one for each byte.
const BYTES: usize = 256;

/// `tokenizer.json` and `tokenizer_config.json`, or `None` if the vocabulary has no room for 256 bytes and two marks.
///
/// The configuration's beginning and end of text keep their ids, the bytes take the lowest others. All further ids are
/// made-up words, which no text is encoded to but which show what a random model chooses.
pub(crate) fn byte_level(config: &Config) -> Option<(Value, Value)> {
    if config.vocab_size < BYTES + 2 {
        return None;
    }
    let marks = marks(config);
    let mut bytes = alphabet();
    let mut vocab = Map::new();
    for id in 0..config.vocab_size {
        let token = match u32::try_from(id).ok().and_then(|id| marks.get(&id)) {
            Some(mark) => mark.clone(),
            None => bytes.next().map_or_else(|| word(id), String::from),
        };
        vocab.insert(token, id.into());
    }
    let added: Vec<_> = marks
        .iter()
        .map(|(id, mark)| {
            json!({
                "id": id, "content": mark, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    });

    let mark = |id: Option<&u32>| id.and_then(|id| marks.get(id)).map_or(Value::Null, |mark| mark.as_str().into());
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": mark(config.bos_token_id.as_ref()),
        "eos_token": mark(config.eos_token_ids.first()),
        "add_bos_token": false,
        "model_max_length": config.max_position_embeddings,
        "chat_template": "{% if bos_token %}{{ bos_token }}{% endif %}{% for m in messages %}{{ m['role'] }}: \
                          {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    });
    Some((tokenizer, settings))
}

/// Ids with a meaning of their own. A model may begin and end texts with the same one.
fn marks(config: &Config) -> BTreeMap<u32, String> {
    let mut marks = BTreeMap::new();
    if let Some(id) = config.bos_token_id {
        marks.insert(id, "<bos>".to_owned());
    }
    for (number, &id) in config.eos_token_ids.iter().enumerate() {
        marks.insert(id, if number == 0 { "<eos>".to_owned() } else { format!("<eos{}>", number + 1) });
    }
    marks.retain(|&id, _| (id as usize) < config.vocab_size);
    marks
}

/// The printable characters that byte-level tokenizers write for the 256 bytes (GPT-2's `bytes_to_unicode`), printable
/// bytes first, as themselves.
fn alphabet() -> impl Iterator<Item = char> {
    let printable = (33..=126u8).chain(161..=172).chain(174..=255).map(char::from);
    printable.chain((256..=323).filter_map(char::from_u32))
}

/// A word after a space: the id in letters.
fn word(id: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = id;
    while rest > 0 {
        letters.push(char::from(b'a' + (rest % 26) as u8));
        rest /= 26;
    }
    // The space in front, which byte-level tokenizers write so, keeps words apart and off the single bytes.
    std::iter::once('\u{120}').chain(letters).collect()
}
