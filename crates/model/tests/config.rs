//! Configurations: every golden checkpoint and preset is read as it is meant.

mod common;

use std::{collections::BTreeMap, fs};

use anabranch::{Dtype, GroupScore, Renormalize, RopeLayout, RopeScaling, Score};
use anabranch_model::{
    Config,
    config::{Attention, FeedForward, QkNorm},
    presets,
};
use common::{GOLDEN, changed, folder, golden_json, read};
use safetensors::SafeTensors;
use serde_json::{Value, json};

#[test]
fn tensors_are_those_of_every_golden_checkpoint() {
    for name in GOLDEN {
        let config = Config::from_dir(&folder(name)).unwrap();
        let prediction = format!("model.layers.{}.", config.layers.len());
        let mut stored = BTreeMap::new();
        for entry in fs::read_dir(folder(name)).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap();
            if !file.starts_with("model") || !file.ends_with(".safetensors") {
                continue;
            }
            let bytes = fs::read(&path).unwrap();
            let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
            for (tensor, info) in header.tensors() {
                if !tensor.starts_with(&prediction) {
                    stored.insert(tensor, (info.shape.clone(), format!("{:?}", info.dtype)));
                }
            }
        }
        let dtype = |dtype| match dtype {
            Dtype::F32 => "F32".to_owned(),
            Dtype::Bf16 => "BF16".to_owned(),
            Dtype::F8E4m3 => "F8_E4M3".to_owned(),
            other => panic!("{other}"),
        };
        let tensors = config.tensors().into_iter();
        let listed: BTreeMap<_, _> = tensors.map(|tensor| (tensor.name, (tensor.shape, dtype(tensor.dtype)))).collect();
        assert!(!stored.is_empty());
        assert_eq!(listed, stored, "{name}");
        assert_eq!(config.tensor_count(), listed.len(), "{name}");
    }
}

#[test]
fn deepseek_v3_is_read_as_published() {
    let config = Config::preset("deepseek-v3").unwrap().unwrap();
    let Attention::Latent { num_heads: 128, q_lora_rank: Some(1536), kv_lora_rank: 512, inner_norm_eps, .. } =
        config.attention
    else {
        panic!("{:?}", config.attention)
    };
    assert_eq!(inner_norm_eps, 1e-6);
    assert!((config.softmax_scale - 0.135_234).abs() < 1e-6);
    assert_eq!(config.rope.layout(), RopeLayout::Interleaved);
    assert_eq!((config.rope.rotary_dim(), config.rope.attention_factor()), (64, 1.0));
    assert_eq!(config.fp8_block, Some([128, 128]));
    assert_eq!(config.layers.iter().filter(|kind| **kind == FeedForward::Dense).count(), 3);
    let moe = config.moe.unwrap();
    assert!(moe.selection_bias);
    let routing = moe.routing;
    assert_eq!((routing.num_experts(), routing.topk(), routing.scale()), (256, 8, 2.5));
    assert_eq!((routing.score(), routing.renormalize()), (Score::Sigmoid, Renormalize::Sum));
    let groups = routing.group_limit().unwrap();
    assert_eq!((groups.n_group, groups.topk_group, groups.score), (8, 4, GroupScore::Top2Sum));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(0), vec![1]));
}

#[test]
fn deepseek_v2_lite_has_its_softmax_scale_and_no_groups() {
    let config = Config::preset("deepseek-v2-lite").unwrap().unwrap();
    assert!((config.softmax_scale - 0.114_721).abs() < 1e-6);
    let routing = config.moe.unwrap().routing;
    assert_eq!(routing.group_limit(), None);
    assert_eq!(routing.renormalize(), Renormalize::None);
}

/// Transformers ignores `norm_topk_prob` in this family and always scales.
#[test]
fn deepseek_v2_never_renormalizes() {
    let config = read(&changed("deepseek-v2", &[("norm_topk_prob", Some(json!(true)))])).unwrap();
    let routing = config.moe.unwrap().routing;
    assert_eq!((routing.renormalize(), routing.scale()), (Renormalize::None, 16.0));
    assert_eq!(routing.group_limit().unwrap().score, GroupScore::Max);
}

#[test]
fn attention_of_each_family() {
    let grouped = |name: &str| match Config::from_dir(&folder(name)).unwrap().attention {
        Attention::Grouped { qkv_bias, output_bias, qk_norm, .. } => (qkv_bias, output_bias, qk_norm),
        other => panic!("{other:?}"),
    };
    assert_eq!(grouped("deepseek-v1"), (false, false, QkNorm::None));
    assert_eq!(grouped("glm4-moe"), (true, false, QkNorm::PerHead));
    assert_eq!(grouped("qwen2-moe"), (true, false, QkNorm::None));
    assert_eq!(grouped("qwen3-moe"), (false, false, QkNorm::PerHead));
    assert_eq!(grouped("olmoe"), (false, false, QkNorm::Whole));
    let glm = Config::from_dir(&folder("glm4-moe")).unwrap();
    assert_eq!((glm.rope.rotary_dim(), glm.dtype), (16, Dtype::Bf16));
}

#[test]
fn biases_go_where_each_family_has_them() {
    let biases = |name: &str| {
        let config = read(&changed(name, &[("attention_bias", Some(json!(true)))])).unwrap();
        let names = config.tensors().into_iter().map(|tensor| tensor.name);
        names
            .filter_map(|name| Some(name.strip_prefix("model.layers.0.self_attn.")?.strip_suffix(".bias")?.to_owned()))
            .collect::<Vec<_>>()
    };
    for name in ["llama", "deepseek-v1", "qwen3-moe", "olmoe"] {
        assert_eq!(biases(name), ["q_proj", "k_proj", "v_proj", "o_proj"], "{name}");
    }
    assert_eq!(biases("glm4-moe"), ["q_proj", "k_proj", "v_proj"]);
    assert_eq!(biases("deepseek-v3"), ["q_a_proj", "kv_a_proj_with_mqa", "o_proj"]);
    assert_eq!(biases("deepseek-v2-lite"), ["kv_a_proj_with_mqa", "o_proj"]);
    assert!(biases("mixtral").is_empty());
}

#[test]
fn both_styles_of_a_file_mean_the_same() {
    let published = golden_json("deepseek-v3");
    let mut newer = published.clone();
    let map = newer.as_object_mut().unwrap();
    let mut rope = map.shift_remove("rope_scaling").unwrap();
    rope["rope_theta"] = map.shift_remove("rope_theta").unwrap();
    rope["rope_type"] = rope.as_object_mut().unwrap().shift_remove("type").unwrap();
    map.insert("rope_parameters".to_owned(), rope);
    for (old, new) in [("torch_dtype", "dtype"), ("n_routed_experts", "num_local_experts")] {
        let value = map.shift_remove(old).unwrap();
        map.insert(new.to_owned(), value);
    }
    assert_eq!(read(&newer).unwrap(), read(&published).unwrap());
}

#[test]
fn rope_scalings_are_read() {
    let scaling = |value: Value| read(&changed("llama", &[("rope_scaling", Some(value))])).unwrap().rope.scaling();
    assert_eq!(scaling(json!({"type": "linear", "factor": 2.0})), RopeScaling::Linear { factor: 2.0 });
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    assert_eq!(
        scaling(llama3),
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 }
    );
    let yarn = scaling(json!({"rope_type": "yarn", "factor": 4.0}));
    let RopeScaling::Yarn { original_context, beta_fast, attention_factor, truncate, .. } = yarn else {
        panic!("{yarn:?}")
    };
    assert_eq!((original_context, beta_fast, truncate), (512, 32.0, true));
    assert!((attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12);
}

#[test]
fn moe_layers_come_at_their_intervals() {
    let kinds =
        |config: Config| config.layers.iter().map(|kind| u8::from(*kind == FeedForward::Moe)).collect::<Vec<_>>();
    let deepseek = |freq: usize| {
        let fields = [("num_hidden_layers", Some(json!(6))), ("moe_layer_freq", Some(json!(freq)))];
        kinds(read(&changed("deepseek-v1", &fields)).unwrap())
    };
    assert_eq!(deepseek(1), [0, 1, 1, 1, 1, 1]);
    assert_eq!(deepseek(2), [0, 0, 1, 0, 1, 0]);
    let qwen = [
        ("num_hidden_layers", Some(json!(6))),
        ("decoder_sparse_step", Some(json!(2))),
        ("mlp_only_layers", Some(json!([3]))),
    ];
    assert_eq!(kinds(read(&changed("qwen3-moe", &qwen)).unwrap()), [0, 1, 0, 0, 0, 1]);
    let dense = read(&changed("deepseek-v1", &[("first_k_dense_replace", Some(json!(3)))])).unwrap();
    assert_eq!(dense.moe, None);
}

#[test]
fn windows_as_long_as_the_context_change_nothing() {
    for (name, window) in [("mixtral", 512), ("qwen3-moe", 64)] {
        let with = read(&changed(name, &[("sliding_window", Some(json!(window)))])).unwrap();
        assert_eq!(with, read(&golden_json(name)).unwrap());
    }
}

#[test]
fn a_generation_config_takes_precedence_and_may_list_end_tokens() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(folder("llama").join("config.json"), dir.path().join("config.json")).unwrap();
    assert_eq!(Config::from_dir(dir.path()).unwrap().eos_token_ids, [1]);
    let generation = dir.path().join("generation_config.json");
    fs::write(&generation, r#"{"eos_token_id": [7, 9], "bos_token_id": 5}"#).unwrap();
    let config = Config::from_dir(dir.path()).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(5), vec![7, 9]));
    fs::write(&generation, r#"{"eos_token_id": -1}"#).unwrap();
    let error = Config::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("generation_config.json: eos_token_id must be"), "{error}");
}

#[test]
fn folders_files_and_presets_are_loaded() {
    let path = folder("llama");
    let from_folder = Config::load(path.to_str().unwrap()).unwrap();
    let from_file = Config::load(path.join("config.json").to_str().unwrap()).unwrap();
    assert_eq!(from_folder, from_file);
    for name in presets::names() {
        Config::load(name).unwrap_or_else(|error| panic!("{error}"));
        let json: Value = serde_json::from_str(presets::json(name).unwrap()).unwrap();
        assert!(json["_source"].as_str().is_some_and(|source| source.len() > 20), "{name}");
    }
    let error = Config::load("deepseek-moe-17b").unwrap_err().to_string();
    assert!(error.contains("the presets are deepseek-moe-2b, deepseek-moe-16b"), "{error}");
}
