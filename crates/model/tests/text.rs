//! Tokenizer, chat templates and streamed text, with the bundled byte-level tokenizer and small ones made here.

use std::{fs, path::Path};

use anabranch_model::{ChatTemplate, Error, Message, Reply, SpecialTokens, TextStream, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

const LLAMA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/models/llama");

fn byte_level() -> Tokenizer {
    Tokenizer::from_dir(Path::new(LLAMA)).expect("the bundled tokenizer")
}

/// A folder with the bundled tokenizer.json and this configuration.
fn folder(config: &Value) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    fs::copy(Path::new(LLAMA).join("tokenizer.json"), dir.path().join("tokenizer.json")).expect("copied");
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).expect("written");
    dir
}

/// A tokenizer with byte fallback and Llama's decoder: two words, and the bytes as tokens of ids 2 to 257.
fn byte_fallback() -> (TempDir, Tokenizer) {
    let mut vocab = serde_json::Map::new();
    vocab.insert("<unk>".to_owned(), json!(0));
    vocab.insert("▁water".to_owned(), json!(1));
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(byte + 2));
    }
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": []}
    });
    let dir = tempfile::tempdir().expect("a temporary folder");
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).expect("written");
    let tokenizer = Tokenizer::from_dir(dir.path()).expect("a valid tokenizer");
    (dir, tokenizer)
}

fn pieces(tokenizer: &Tokenizer, ids: &[u32], stop: &[String]) -> Vec<String> {
    let mut stream = TextStream::new(tokenizer, stop).expect("valid stop strings");
    let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).expect("decodes")).collect();
    pieces.push(stream.finish().expect("decodes"));
    pieces
}

fn message(error: &Error) -> String {
    let text = error.to_string();
    assert!(!text.contains('\n'), "one sentence, got {text:?}");
    text
}

proptest! {
    #[test]
    fn streamed_text_is_the_text(text in "\\PC{1,30}|[a-é→😀 \n]{1,20}") {
        let tokenizer = byte_level();
        let ids = tokenizer.encode(&text).unwrap();
        let pieces = pieces(&tokenizer, &ids, &[]);
        prop_assert_eq!(pieces.concat(), tokenizer.decode(&ids).unwrap());
        // The characters are whole: none that the text does not have was shown.
        if !text.contains(char::REPLACEMENT_CHARACTER) {
            prop_assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)));
        }
    }

    #[test]
    fn streamed_text_is_the_text_of_any_tokens(ids in prop::collection::vec(0u32..600, 0..60)) {
        let tokenizer = byte_level();
        prop_assert_eq!(pieces(&tokenizer, &ids, &[]).concat(), tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn streamed_text_is_the_text_with_byte_fallback(words in prop::collection::vec("water|[a-é→😀]{1,4}", 0..12)) {
        let (_dir, tokenizer) = byte_fallback();
        let mut ids: Vec<u32> = Vec::new();
        for word in &words {
            if word == "water" { ids.push(1) } else { ids.extend(word.bytes().map(|byte| u32::from(byte) + 2)) }
        }
        prop_assert_eq!(pieces(&tokenizer, &ids, &[]).concat(), tokenizer.decode(&ids).unwrap());
    }

    #[test]
    fn a_stop_string_cuts_where_it_begins(
        before in "[a-df-h →😀]{0,12}", stop in "e[a-h →😀]{0,5}", after in "[a-z ]{0,6}",
    ) {
        let tokenizer = byte_level();
        let ids = tokenizer.encode(&format!("{before}{stop}{after}")).unwrap();
        let pieces = pieces(&tokenizer, &ids, &[stop]);
        prop_assert_eq!(pieces.concat(), before);
    }
}

#[test]
fn half_a_character_waits_for_the_other_half() {
    let tokenizer = byte_level();
    let ids = tokenizer.encode("a😀b").unwrap();
    assert!(ids.len() > 3, "the vocabulary has no token of a whole emoji");
    let pieces = pieces(&tokenizer, &ids, &[]);
    assert_eq!(pieces[0], "a");
    assert!(pieces[1..ids.len() - 2].iter().all(String::is_empty), "{pieces:?}");
    assert_eq!(pieces[ids.len() - 2], "😀");
}

#[test]
fn bytes_that_are_no_text_are_shown_and_do_not_hold_up_the_rest() {
    let (_dir, tokenizer) = byte_fallback();
    let byte = |byte: u32| byte + 2;
    // Never the beginning of a character.
    let shown = pieces(&tokenizer, &[byte(0xFF); 6], &[]);
    assert_eq!(shown[..6], ["", "", "", "\u{FFFD}", "\u{FFFD}", "\u{FFFD}"]);
    assert_eq!(shown.concat(), "\u{FFFD}".repeat(6));
    // A good character before a bad byte stays as it was shown, though the decoder spoils it afterwards.
    let shown = pieces(&tokenizer, &[byte(0xC3), byte(0xA9), byte(0xFF), 1], &[]);
    assert_eq!(shown.concat(), "é\u{FFFD} water");
    // A character that is never finished comes out at the end.
    assert_eq!(pieces(&tokenizer, &[1, byte(0xC3)], &[]), ["water", "", "\u{FFFD}"]);
}

#[test]
fn a_possible_stop_string_is_held_back_until_it_is_none() {
    let (_dir, tokenizer) = byte_fallback();
    let ids: Vec<u32> = "xENy".bytes().map(|byte| u32::from(byte) + 2).collect();
    let stop = ["END".to_owned()];
    assert_eq!(pieces(&tokenizer, &ids, &stop), ["x", "", "", "ENy", ""]);
    assert_eq!(pieces(&tokenizer, &ids[..3], &stop), ["x", "", "", "EN"]);
    let error = TextStream::new(&tokenizer, &[String::new()]).unwrap_err();
    assert_eq!(message(&error), "a stop string is empty: give at least one character, or none at all");
}

#[test]
fn bos_is_added_once_if_the_configuration_says_so() {
    let plain = byte_level();
    assert_eq!(plain.vocab_size(), 512);
    let ids = plain.encode("the river").unwrap();
    assert_ne!(ids[0], 0);
    assert_eq!(plain.decode(&ids).unwrap(), "the river");

    for bos in [json!("<bos>"), json!({"content": "<bos>", "lstrip": false})] {
        let dir = folder(&json!({"bos_token": bos, "add_bos_token": true}));
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let begun: Vec<u32> = [&[0], ids.as_slice()].concat();
        assert_eq!(tokenizer.encode("the river").unwrap(), begun);
        assert_eq!(tokenizer.encode("<bos>the river").unwrap(), begun);
        assert_eq!(tokenizer.decode(&begun).unwrap(), "the river");
    }
}

#[test]
fn the_post_processor_adds_its_tokens() {
    let dir = folder(&json!({"bos_token": "<bos>", "add_bos_token": true}));
    let path = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [0], "tokens": ["<bos>"]}}
    });
    // What a training script leaves behind must not cut or fill a prompt.
    tokenizer["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    tokenizer["padding"] = json!({
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 1, "pad_type_id": 0,
        "pad_token": "<eos>"
    });
    fs::write(&path, tokenizer.to_string()).unwrap();
    let ids = byte_level().encode("the river").unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.encode("the river").unwrap(), [&[0], ids.as_slice()].concat());
}

#[test]
fn bad_tokenizer_files_are_refused() {
    let fails = |dir: &TempDir| message(&Tokenizer::from_dir(dir.path()).unwrap_err());
    let empty = tempfile::tempdir().unwrap();
    assert!(fails(&empty).starts_with("cannot read "));

    for text in ["", "{", "[]", "{\"model\": {\"type\": \"BPE\"}}", "\u{0}"] {
        fs::write(empty.path().join("tokenizer.json"), text).unwrap();
        assert!(fails(&empty).contains("tokenizer.json: is no tokenizer: "), "{text}");
    }
    fs::write(empty.path().join("tokenizer.json"), [0xFF, 0xFE]).unwrap();
    assert!(fails(&empty).contains("is no tokenizer"));

    let config = |value| fails(&folder(&value));
    assert!(config(json!({"add_bos_token": true})).ends_with("add_bos_token is true, but there is no bos_token"));
    assert!(config(json!({"add_bos_token": true, "bos_token": "<s>"})).contains("bos_token is \"<s>\", which"));
    assert!(config(json!({"add_bos_token": 1})).contains("add_bos_token must be true or false, got 1"));
    assert!(config(json!({"bos_token": 3})).contains("bos_token must be a string or an object"));
    assert!(config(json!({"chat_template": 3})).contains("chat_template must be a string or a list"));
    assert!(config(json!({"chat_template": []})).contains("without one named \"default\""));
    assert!(config(json!({"chat_template": "{% if %}"})).contains("the chat template fails: syntax error"));

    let dir = folder(&json!({}));
    fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(fails(&dir).contains("tokenizer_config.json: is not valid JSON: "));
}

#[test]
fn an_empty_prompt_is_refused() {
    assert!(matches!(byte_level().encode(""), Err(Error::Input(_))));
}

fn turn(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}

fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
    let path = Path::new("template");
    let special = SpecialTokens::from_config(&json!({"bos_token": "<s>", "eos_token": "</s>"}), path)?;
    ChatTemplate::new(path, source)?.render(messages, &special, Reply::Begin)
}

#[test]
fn the_bundled_template_is_rendered() {
    let tokenizer = byte_level();
    let messages = [turn("system", "be brief"), Message::user("hello")];
    let text = "<bos>system: be brief\nuser: hello\n";
    assert_eq!(tokenizer.render_chat(&messages, Reply::None).unwrap(), text);
    let ids = tokenizer.encode_chat(&messages).unwrap();
    assert_eq!(ids[0], 0);
    assert_eq!(ids, tokenizer.encode(&format!("{text}assistant:")).unwrap());
}

#[test]
fn a_template_file_goes_before_the_configuration() {
    let named = json!([{"name": "tool_use", "template": "no"}, {"name": "default", "template": "from the list"}]);
    let dir = folder(&json!({"chat_template": named}));
    let rendered = || Tokenizer::from_dir(dir.path())?.render_chat(&[Message::user("x")], Reply::Begin);
    assert_eq!(rendered().unwrap(), "from the list");
    fs::write(dir.path().join("chat_template.jinja"), "from the file\n").unwrap();
    assert_eq!(rendered().unwrap(), "from the file");
}

#[test]
fn a_model_without_a_template_says_so() {
    let dir = folder(&json!({}));
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert!(!tokenizer.has_chat_template());
    let error = tokenizer.encode_chat(&[Message::user("x")]).unwrap_err();
    assert!(message(&error).contains("has no chat template"), "{error}");
    assert!(message(&error).contains("leave out --chat"), "{error}");
}

#[test]
fn templates_see_what_transformers_gives_them() {
    let user = [Message::user(" Hi ")];
    // Trimmed blocks, stripped indentation, loop controls, namespaces.
    let blocks =
        "{% for m in messages %}\n    {% if loop.first %}\n{{ m.role }}\n    {% endif %}\n{% break %}{% endfor %}";
    assert_eq!(render(blocks, &user).unwrap(), "user\n");
    // Python's methods, slices and tests; the variables that Transformers passes as None.
    let python = "{{ messages[0]['content'].strip().upper() }}{{ tools is none }}{{ 'a-b'.split('-')[-1] }}\
                  {{ messages[-1:]|length }}{{ undefined_name is defined }}{{ eos_token }}";
    assert_eq!(render(python, &user).unwrap(), "HITrueb1False</s>");
    let today = render("{{ strftime_now('%Y-%m-%d') }}", &user).unwrap();
    assert_eq!((today.len(), today.starts_with("20")), (10, true));
}

#[test]
fn tojson_is_pythons() {
    // python3 -c 'import json; print(json.dumps(VALUE, ensure_ascii=False, ...))'
    let value = r#"{% set v = {"b": [1, 2.5, true, none], "a": "<é'\"\n>", "c": {}} %}"#;
    let render = |filter: &str| render(&format!("{value}{{{{ v|{filter} }}}}"), &[Message::user("x")]).unwrap();
    assert_eq!(render("tojson"), r#"{"b": [1, 2.5, true, null], "a": "<é'\"\n>", "c": {}}"#);
    let sorted = r#"{"a":"<\u00e9'\"\n>","b":[1,2.5,true,null],"c":{}}"#;
    assert_eq!(render("tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':'))"), sorted);
    let indented =
        "{\n  \"b\": [\n    1,\n    2.5,\n    true,\n    null\n  ],\n  \"a\": \"<é'\\\"\\n>\",\n  \"c\": {}\n}";
    assert_eq!(render("tojson(indent=2)"), indented);
}

#[test]
fn a_template_can_refuse_and_cannot_run_for_ever() {
    let user = [Message::user("x")];
    let fails = |source: &str| message(&render(source, &user).unwrap_err());
    let refusal = "{% macro no() %}{{ raise_exception('roles must\n alternate') }}{% endmacro %}{{ no() }}";
    assert_eq!(fails(refusal), "the chat template in template refuses: roles must alternate");
    let endless = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
    assert!(fails(endless).contains("more work than any conversation needs"));
    assert!(
        fails("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}").starts_with("template: the chat template")
    );
    let wide = "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}";
    assert!(fails(wide).contains("more work than any conversation needs"));
    let deep =
        "{% set ns = namespace(x=[]) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}";
    assert!(fails(deep).contains("nested too deeply"));
    assert!(fails("{{ missing.name }}").contains("the chat template fails: "));
    assert_eq!(message(&render("x", &[]).unwrap_err()), "the conversation is empty: give at least one message");
}

#[test]
fn a_long_conversation_is_within_the_bounds() {
    let messages: Vec<Message> = (0..400).map(|turn_index| turn("user", &"words ".repeat(turn_index))).collect();
    let template = "{% for m in messages %}{% if m.content is string %}{{ m.role ~ ': ' ~ m.content | trim }}\n{% endif %}{% endfor %}";
    assert_eq!(render(template, &messages).unwrap().lines().count(), 400);
}

#[test]
fn a_template_cannot_exhaust_the_stack() {
    let nest = "{% set ns = namespace(x=[], y=[]) %}{% for i in range(STEPS) %}\
                {% set ns.x = [ns.x] %}{% set ns.y = [ns.y] %}{% endfor %}";
    // Enough messages for fuel that nests far deeper than an ordinary stack bears.
    let messages = vec![Message::user("x"); 400];
    for use_it in
        ["", "{{ ns.x == ns.y }}", "{{ ns.x }}", "{{ [ns.x, ns.y]|sort|length }}", "{{ raise_exception(ns.x|string) }}"]
    {
        let ends = format!("{nest}{use_it}").replace("STEPS", "20000");
        let refused = render(&ends, &messages).is_err_and(|error| matches!(error, Error::Input(_)));
        assert_eq!(refused, use_it.contains("raise"), "{use_it}");
        let endless = format!("{nest}{nest}{nest}{nest}{use_it}").replace("STEPS", "100000");
        assert!(matches!(render(&endless, &messages), Err(Error::Tokenizer { .. })), "{use_it}");
    }
}

#[test]
fn generation_tags_write_what_is_in_them() {
    let template =
        "{% for m in messages %}\n{%- generation -%}\n {{ m.content }}\n{% endgeneration %}generation{% endfor %}";
    assert_eq!(render(template, &[Message::user("x")]).unwrap(), "x\ngeneration");
}
