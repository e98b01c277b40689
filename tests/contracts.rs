//! What the operations refuse, and how they say it.

use anabranch::{
    Adaptive, Capacity, Dtype, Error, GroupLimit, GroupScore, Routing,
    reference::{
        Expert, Linear, Matrix, Permutation, RopeTable, combine, embedding, expert_forward, grouped_gemm, linear,
        rms_norm, rms_norm_heads, rotate, router,
    },
};
use anabranch::{Rope, RopeLayout, RopeScaling};

/// The error's sentence.
fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn routings_that_contradict_themselves() {
    let groups = |n_group, topk_group, score| GroupLimit { n_group, topk_group, score };
    for (routing, sentence) in [
        (Routing::builder(0, 1), "routing: num_experts must be 1 to 1024, got 0"),
        (Routing::builder(1025, 1), "routing: num_experts must be 1 to 1024, got 1025"),
        (Routing::builder(8, 0), "routing: topk must be 1 to 8 with 8 experts, got 0"),
        (Routing::builder(8, 9), "routing: topk must be 1 to 8 with 8 experts, got 9"),
        (Routing::builder(64, 33), "routing: topk must be 1 to 32 with 64 experts, got 33"),
        (Routing::builder(8, 2).scale(f32::NAN), "routing: scale must be finite and positive, got NaN"),
        (Routing::builder(8, 2).scale(0.0), "routing: scale must be finite and positive, got 0"),
        (
            Routing::builder(8, 2).group_limit(groups(3, 1, GroupScore::Max)),
            "routing: n_group must be a divisor of 8 experts, got 3",
        ),
        (
            Routing::builder(8, 2).group_limit(groups(0, 1, GroupScore::Max)),
            "routing: n_group must be a divisor of 8 experts, got 0",
        ),
        (
            Routing::builder(8, 2).group_limit(groups(4, 5, GroupScore::Max)),
            "routing: topk_group must be 1 to 4, got 5",
        ),
        (
            Routing::builder(8, 3).group_limit(groups(4, 1, GroupScore::Max)),
            "routing: topk must be at most 2, the experts of 1 groups, got 3",
        ),
        (
            Routing::builder(8, 1).group_limit(groups(8, 1, GroupScore::Top2Sum)),
            "routing: n_group must be small enough for two experts in each group, got 8",
        ),
        (
            Routing::builder(8, 1).capacity(Capacity::Factor(0.0)),
            "routing: capacity factor must be finite and positive, got 0",
        ),
        (Routing::builder(8, 1).capacity(Capacity::Tokens(0)), "routing: capacity must be at least one token, got 0"),
    ] {
        assert_eq!(refused(routing.build()), sentence);
    }
}

#[test]
fn router_arguments_that_do_not_fit() {
    let routing = Routing::builder(4, 2).build().unwrap();
    assert_eq!(refused(router(&routing, &[0.0f32; 7], None, None)), "router: logits must be 4 long, got 7");
    assert_eq!(
        refused(router(&routing, &[0.0f32; 8], Some(&[0.0; 3]), None)),
        "router: selection_bias must be 4 long, got 3"
    );
    assert_eq!(
        refused(router(&routing, &[0.0f32; 8], None, Some(&[0.5; 2]))),
        "router: complexity must be absent with Adaptive::Fixed, got given"
    );
    let adaptive = Routing::builder(4, 2).adaptive(Adaptive::Complexity).build().unwrap();
    assert_eq!(
        refused(router(&adaptive, &[0.0f32; 8], None, None)),
        "router: complexity must be given with Adaptive::Complexity, got absent"
    );
    assert!(refused(router(&adaptive, &[0.0f32; 8], None, Some(&[0.5; 3]))).contains("must be 2 long, got 3"));
}

#[test]
fn maps_that_point_nowhere() {
    assert_eq!(refused(Permutation::new(&[0, 4], 2, 4)), "permute: topk_ids holds 4, but must be below 4");
    assert_eq!(refused(Permutation::new(&[0, -2], 2, 4)), "permute: topk_ids holds -2, but must be below 4");
    assert!(refused(Permutation::new(&[0, 1, 2], 2, 4)).contains("topk_ids must be 2 long, got 3"));
    assert!(refused(Permutation::new(&[0], 0, 4)).contains("topk_ids must be 0 long, got 1"));
    let permutation = Permutation::new(&[0, 1, 1, -1], 2, 2).unwrap();
    assert!(permutation.permute(&[0.0f32; 5], 2).is_err());
    assert!(permutation.unpermute(&[0.0f32; 8], 2).is_err());
    assert!(combine(&[0.0f32; 8], &[0.0; 4], &permutation, 2).is_err());
    assert!(combine(&[0.0f32; 6], &[0.0; 3], &permutation, 2).is_err());
}

#[test]
fn weights_that_do_not_fit() {
    let values = [0.5; 12];
    let (wide, tall) = (Matrix::from_f32(3, 4, &values).unwrap(), Matrix::from_f32(4, 3, &values).unwrap());
    let x = [1.0f32; 8];
    assert_eq!(refused(linear(&x, 3, &wide.into())), "linear: x must be 12 long, got 8");
    let biased = Linear { weight: wide, bias: Some(&values[..2]) };
    assert_eq!(refused(linear(&x, 2, &biased)), "linear: bias must be 3 long, got 2");
    let expert = Expert::SwiGlu { gate: wide.into(), up: wide.into(), down: wide.into() };
    assert!(expert_forward(&x, 2, &expert).is_err());
    let expert = Expert::SwiGlu { gate: wide.into(), up: wide.into(), down: tall.into() };
    assert_eq!(expert_forward(&x, 2, &expert).unwrap().len(), 8);
    let permutation = Permutation::new(&[0, 1], 1, 2).unwrap();
    assert!(refused(grouped_gemm(&x, 4, &[expert], &permutation)).contains("experts must be 2 long, got 1"));
    assert!(refused(grouped_gemm(&x, 3, &[expert; 2], &permutation)).contains("down projection must be 3 rows, got 4"));
    let odd = Expert::swiglu_stacked(wide, tall);
    assert_eq!(refused(odd), "expert: gate_up rows must be 2 long, got 3");
    assert_eq!(
        refused(Matrix::new(Dtype::Bf16, 2, 2, &[0; 7])),
        "matrix: bytes must be 2 x 2 elements of bf16, got 7 bytes"
    );
}

#[test]
fn rows_and_ids_that_do_not_exist() {
    let values = [0.5; 12];
    let table = Matrix::from_f32(3, 4, &values).unwrap();
    assert_eq!(refused(embedding::<f32>(&table, &[2, 3])), "embedding: ids holds 3, but must be below 3");
    assert!(rms_norm(&[1.0f32; 3], &[], 1e-6).is_err());
    assert!(rms_norm(&[1.0f32; 3], &[1.0; 2], 1e-6).is_err());
    assert_eq!(
        refused(rms_norm_heads(&mut [1.0f32; 6], 3, &[1.0; 4], 1e-6)),
        "rms_norm: weight must be 1 to 3 long, got 4"
    );
    assert!(rms_norm_heads(&mut [1.0f32; 6], 3, &[], 1e-6).is_err());
    assert!(rms_norm_heads(&mut [1.0f32; 5], 3, &[1.0; 2], 1e-6).is_err());
    let rope = Rope::new(4, 1e4, RopeLayout::Half, RopeScaling::None).unwrap();
    let table = RopeTable::new(&rope, 0..2);
    assert!(rotate(&mut [0.0f32; 6], 1, 3, 0, &table).is_err());
    assert!(rotate(&mut [0.0f32; 12], 1, 4, 0, &table).is_err());
    assert!(rotate(&mut [0.0f32; 12], 1, 6, 3, &table).is_err());
    assert!(rotate(&mut [0.0f32; 12], 1, 6, 2, &table).is_ok());
}
