//! The LM head where `config.json` ties it to the embedding table and the checkpoint stores one all the same.

use std::{fs, path::Path};

use anabranch_model::{Batch, Cpu, Model, Segment, checkpoint::write_tensors};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// Logits after two tokens of the golden llama, whose embeddings are tied, with an LM head stored beside them and
/// `tie_word_embeddings` set anew.
fn logits(head: impl Fn(&[u8]) -> Vec<u8>, tied: bool) -> Vec<f32> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/llama");
    let dir = tempfile::tempdir().unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(golden.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], json!(true));
    config["tie_word_embeddings"] = json!(tied);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();

    let stored = fs::read(golden.join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&stored).unwrap();
    let embedding = stored.tensor("model.embed_tokens.weight").unwrap();
    let head = head(embedding.data());
    let views = stored.tensors();
    let mut tensors: Vec<(&str, Dtype, &[usize], &[u8])> =
        views.iter().map(|(name, view)| (name.as_str(), view.dtype(), view.shape(), view.data())).collect();
    tensors.push(("lm_head.weight", embedding.dtype(), embedding.shape(), &head));
    write_tensors(&dir.path().join("model.safetensors"), tensors, &[]).unwrap();

    let model = Model::load(dir.path(), Cpu, &mut |_, _| {}).unwrap();
    let segments = [Segment { blocks: &[0], position: 0, len: 2 }];
    let batch = Batch { ids: &[7, 11], segments: &segments };
    let hidden = model.forward(&batch, &mut model.cache(1).unwrap(), None).unwrap();
    model.logits(&hidden, &[1]).unwrap()
}

/// As in Transformers 5, which ties only what is equal.
#[test]
fn a_head_of_its_own_is_used() {
    let same = |table: &[u8]| table.to_vec();
    // Rows in the opposite order: every bfloat16 stays what it was.
    let other = |table: &[u8]| table.chunks_exact(2 * 64).rev().flatten().copied().collect();
    assert_eq!(logits(same, true), logits(same, false));
    assert_eq!(logits(other, true), logits(other, false));
    let reversed: Vec<f32> = logits(same, true).into_iter().rev().collect();
    assert_eq!(logits(other, true), reversed);
}
