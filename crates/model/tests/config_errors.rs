//! Defective configurations are refused in a sentence that names the field, and never panic.

mod common;

use std::{fs, path::Path};

use anabranch::Dtype;
use anabranch_model::{Config, Error, analysis::Analysis};
use common::{GOLDEN, changed, folder, golden_json, read};
use proptest::prelude::*;
use serde_json::{Value, json};

/// The message with which the change of one field is refused.
fn refusal(name: &str, key: &str, new: Value) -> String {
    let error = read(&changed(name, &[(key, Some(new))])).expect_err(key);
    assert!(matches!(error, Error::Config { .. }));
    let message = error.to_string();
    assert!(message.starts_with("config.json: ") && !message.contains('\n'), "{message}");
    message
}

#[test]
fn files_that_are_no_json_object() {
    let error = |text: &str| Config::from_json(Path::new("config.json"), text).unwrap_err().to_string();
    assert!(error("{\"a\": ").contains("not valid JSON: EOF"));
    assert_eq!(error("[1]"), "config.json: expected a JSON object, got a list of 1");
    assert!(error("{\"hidden_size\": 1e999}").contains("out of range"));
    assert!(error(&"[".repeat(100_000)).contains("recursion limit"));
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Config::from_dir(dir.path()), Err(Error::Io { .. })));
    fs::write(dir.path().join("config.json"), b"{\"a\": \"\xff\"}").unwrap();
    let message = Config::from_dir(dir.path()).unwrap_err().to_string();
    assert!(message.contains("expected UTF-8 text, got an invalid byte at 7"), "{message}");
}

#[test]
fn a_weight_file_instead_of_a_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let message = Config::load(path.to_str().unwrap()).unwrap_err().to_string();
    assert!(message.contains("expected a JSON file of at most 16777216 bytes, got 1099511627776"), "{message}");
}

#[test]
fn unknown_model_type_lists_the_supported() {
    let message = refusal("llama", "model_type", json!("gpt2"));
    assert!(message.contains(r#"model_type must be "deepseek", "deepseek_v2", "#), "{message}");
    assert!(message.ends_with(r#"got the string "gpt2""#), "{message}");
    let error = read(&changed("llama", &[("model_type", None)])).unwrap_err().to_string();
    assert!(error.contains("model_type is missing"), "{error}");
}

#[test]
fn missing_fields_are_named() {
    let needed = [
        ("llama", "hidden_size"),
        ("llama", "vocab_size"),
        ("llama", "rms_norm_eps"),
        ("deepseek-v1", "n_routed_experts"),
        ("deepseek-v1", "first_k_dense_replace"),
        ("deepseek-v2", "topk_method"),
        ("deepseek-v2", "kv_lora_rank"),
        ("deepseek-v2", "topk_group"),
        ("deepseek-v3", "n_group"),
        ("deepseek-v3", "routed_scaling_factor"),
        ("mixtral", "num_key_value_heads"),
        ("qwen2-moe", "rope_theta"),
        ("qwen2-moe", "shared_expert_intermediate_size"),
        ("qwen3-moe", "norm_topk_prob"),
        ("olmoe", "num_experts_per_tok"),
    ];
    for (name, key) in needed {
        for value in [None, Some(Value::Null)] {
            let error = read(&changed(name, &[(key, value)])).expect_err(key).to_string();
            assert!(error.contains(&format!("{key} is missing")), "{error}");
        }
    }
}

#[test]
fn sizes_that_are_zero_negative_huge_or_strings() {
    let sizes = [
        ("llama", "num_hidden_layers"),
        ("llama", "num_attention_heads"),
        ("llama", "head_dim"),
        ("llama", "intermediate_size"),
        ("llama", "max_position_embeddings"),
        ("deepseek-v3", "qk_rope_head_dim"),
        ("deepseek-v3", "q_lora_rank"),
        ("deepseek-v3", "moe_intermediate_size"),
        ("deepseek-v3", "n_routed_experts"),
        ("deepseek-v3", "num_experts_per_tok"),
        ("deepseek-v3", "n_group"),
        ("qwen2-moe", "decoder_sparse_step"),
        ("mixtral", "num_local_experts"),
    ];
    let defects =
        [json!(0), json!(-8), json!("64"), json!(u64::MAX), json!(1e300), json!(1.5), json!([64]), json!(true)];
    for (name, key) in sizes {
        for value in &defects {
            let message = refusal(name, key, value.clone());
            assert!(message.contains(&format!("{key} must be a whole number from 1 to")), "{value}: {message}");
        }
    }
}

#[test]
fn sizes_that_are_too_large_together() {
    let fields = ["hidden_size", "moe_intermediate_size"].map(|key| (key, Some(json!(1 << 20))));
    let mut value = changed("deepseek-v3", &fields);
    value["num_hidden_layers"] = json!(1000);
    let message = read(&value).unwrap_err().to_string();
    assert!(message.contains("the sizes together must give at most"), "{message}");
    let fields = ["num_attention_heads", "num_key_value_heads", "head_dim"].map(|key| (key, Some(json!(1 << 14))));
    let message = read(&changed("llama", &fields)).unwrap_err().to_string();
    assert!(message.contains("num_attention_heads * head_dim must be at most"), "{message}");
    let fields = [("n_shared_experts", Some(json!(1024))), ("moe_intermediate_size", Some(json!(1 << 20)))];
    let message = read(&changed("deepseek-v1", &fields)).unwrap_err().to_string();
    assert!(message.contains("n_shared_experts * moe_intermediate_size must be at most"), "{message}");
}

#[test]
fn experts_and_groups_that_contradict_each_other() {
    let message = refusal("deepseek-v1", "num_experts_per_tok", json!(17));
    assert!(message.ends_with("num_experts_per_tok must be at most the number of experts (16), got 17"), "{message}");
    let message = refusal("deepseek-v3", "n_group", json!(3));
    assert!(message.ends_with("n_group must divide the number of experts (16), got 3"), "{message}");
    let message = refusal("deepseek-v3", "topk_group", json!(5));
    assert!(message.ends_with("topk_group must be at most n_group (4), got 5"), "{message}");
    let message = refusal("deepseek-v3", "n_group", json!(16));
    assert!(message.contains("at least 2 of the 16 experts"), "{message}");
    let message = refusal("deepseek-v2", "num_experts_per_tok", json!(9));
    assert!(message.contains("at most 8, the experts of topk_group (2) groups, got 9"), "{message}");
    let message = refusal("deepseek-v1", "num_experts", json!(8));
    assert!(message.contains("num_experts must equal n_routed_experts (16), got 8"), "{message}");
}

#[test]
fn heads_that_do_not_divide() {
    let message = refusal("llama", "num_key_value_heads", json!(3));
    assert!(message.ends_with("num_key_value_heads must divide num_attention_heads (4), got 3"), "{message}");
    let message = refusal("mixtral", "hidden_size", json!(66));
    assert!(message.contains("num_attention_heads must divide hidden_size (66)"), "{message}");
    let message = refusal("deepseek-v3", "num_key_value_heads", json!(2));
    assert!(message.contains("must equal num_attention_heads (4) in latent attention"), "{message}");
    let message = refusal("olmoe", "head_dim", json!(32));
    assert!(message.contains("head_dim must be hidden_size / num_attention_heads"), "{message}");
}

#[test]
fn rotary_embeddings_that_do_not_work() {
    let cases = [
        ("llama", "head_dim", json!(15), "an even number of elements, got 15"),
        ("deepseek-v2", "qk_rope_head_dim", json!(7), "an even number of elements, got 7"),
        ("llama", "partial_rotary_factor", json!(0.5), "partial_rotary_factor must be 1"),
        ("glm4-moe", "rope_parameters", json!({"rope_theta": 1e4, "partial_rotary_factor": 2}), "at most 1, got 2"),
        ("llama", "rope_theta", json!(-1.0), "theta must be finite and above 1, got -1"),
        ("llama", "rope_theta", json!("10000"), "rope_theta must be a number"),
        ("llama", "rope_scaling", json!({"type": "longrope"}), r#""llama3" or "yarn", got "longrope""#),
        ("llama", "rope_scaling", json!({"type": "linear"}), "rope_scaling.factor is missing"),
        ("llama", "rope_scaling", json!({"type": "linear", "factor": 0}), "at least 1, got 0"),
        ("llama", "rope_scaling", json!("yarn"), "rope_scaling must be an object"),
        (
            "deepseek-v3",
            "rope_scaling",
            json!({"type": "yarn", "factor": 40, "mscale_all_dim": 1e300}),
            "mscale_all_dim",
        ),
    ];
    for (name, key, value, expected) in cases {
        let message = refusal(name, key, value);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn features_that_are_not_supported() {
    let cases = [
        ("llama", "hidden_act", json!("gelu"), r#"hidden_act must be "silu" or "swish""#),
        ("mixtral", "sliding_window", json!(256), "sliding_window must be absent"),
        ("qwen2-moe", "layer_types", json!(["sliding_attention"]), "layer_types"),
        ("deepseek-v3", "use_mla", json!(false), "use_mla must be true"),
        ("deepseek-v3", "scoring_func", json!("softmax"), r#"scoring_func must be "sigmoid""#),
        ("deepseek-v3", "topk_method", json!("greedy"), r#"topk_method must be "noaux_tc""#),
        ("deepseek-v2", "topk_method", json!("best"), r#"topk_method must be "greedy""#),
        ("deepseek-v2", "mlp_bias", json!(true), "mlp_bias must be false"),
        ("deepseek-v1", "scoring_func", json!("sigmoid"), r#"scoring_func must be "softmax""#),
        ("llama", "torch_dtype", json!("int8"), "torch_dtype must be"),
        ("llama", "rms_norm_eps", json!(0), "rms_norm_eps must be a positive number"),
        ("olmoe", "clip_qkv", json!(-1), "clip_qkv must be a positive number"),
        ("llama", "tie_word_embeddings", json!("yes"), "tie_word_embeddings must be true or false"),
    ];
    for (name, key, value, expected) in cases {
        let message = refusal(name, key, value);
        assert!(message.contains(expected), "{message}");
    }
    let windowed = [("use_sliding_window", Some(json!(true))), ("sliding_window", Some(json!(64)))];
    let message = read(&changed("qwen3-moe", &windowed)).unwrap_err().to_string();
    assert!(message.contains("sliding_window must be absent"), "{message}");
}

#[test]
fn quantization_other_than_block_fp8() {
    let with = |key: &str, value: Value| {
        let mut config = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
        config[key] = value;
        config
    };
    let cases = [
        (json!({"quant_method": "gptq", "bits": 4}), r#"quantization_config.quant_method must be "fp8""#),
        (json!({}), "quantization_config.quant_method is missing"),
        (json!({"quant_method": "fp8"}), "weight_block_size must be two sizes, such as [128, 128], got none"),
        (with("fmt", json!("e5m2")), r#"fmt must be "e4m3""#),
        (with("weight_block_size", json!([128, 0])), "weight_block_size must be a whole number"),
        (with("modules_to_not_convert", json!(["model.layers.0.mlp"])), "modules_to_not_convert must be"),
    ];
    for (value, expected) in cases {
        let message = refusal("deepseek-v3-fp8", "quantization_config", value);
        assert!(message.contains(expected), "{message}");
    }
    let usual = with("modules_to_not_convert", json!(["lm_head", "model.layers.1.mlp.gate"]));
    assert!(read(&changed("deepseek-v3-fp8", &[("quantization_config", Some(usual))])).is_ok());
}

#[test]
fn names_of_golden_folders_are_complete() {
    let folders = fs::read_dir(folder("")).unwrap().count();
    assert_eq!(folders, GOLDEN.len());
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-4i64..4096).prop_map(Value::from),
        (0u32..40).prop_map(|power| Value::from(1u64 << power)),
        any::<f64>().prop_map(Value::from),
        (-2.0..64.0f64).prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        prop::collection::vec(any::<i32>(), 0..4).prop_map(Value::from),
        Just(json!({"type": "yarn", "factor": 1e308, "mscale": -3.0, "mscale_all_dim": 1.0})),
        Just(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever fields hold, a configuration is refused or can be analysed; nothing panics or overflows.
    #[test]
    fn mutated_configurations_never_panic(
        which in 0..GOLDEN.len(),
        mutations in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4),
    ) {
        let mut value = golden_json(GOLDEN[which]);
        let map = value.as_object_mut().unwrap();
        for (index, new) in mutations {
            let key = map.keys().nth(index.index(map.len())).unwrap().clone();
            map.insert(key, new);
        }
        if let Ok(config) = read(&value) {
            let analysis = Analysis::new(&config, usize::MAX, Dtype::F32);
            prop_assert!(analysis.active_parameters <= analysis.total_parameters);
            prop_assert!(config.softmax_scale.is_finite() && config.softmax_scale > 0.0);
        }
    }

    #[test]
    fn arbitrary_text_never_panics(text in ".{0,200}") {
        prop_assert!(Config::from_json(Path::new("config.json"), &text).is_err());
    }
}
