//! What the grouped product's property is tried on, and what the reference says to it.

use std::ops::Range;

use anabranch::{
    Dtype,
    cuda::{Epilogue, Tile},
    reference::{Activation, Expert, Linear, Matrix, Permutation, expert_forward},
};
use half::bf16;
use proptest::prelude::*;

use crate::support::Noise;

/// How tokens choose experts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Flavour {
    /// All alike.
    Uniform,
    /// The first few experts most of the time.
    Skewed,
    /// Every token the same K experts: the others have none.
    OneChoice,
    /// One in four slots is unused.
    Dropped,
    /// No slot is used.
    Nobody,
}

/// An expert layer's first product and its second.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) num_tokens: usize,
    pub(crate) experts: usize,
    pub(crate) topk: usize,
    /// d and n.
    pub(crate) sizes: [usize; 2],
    pub(crate) flavour: Flavour,
    pub(crate) epilogue: Epilogue,
    pub(crate) tile: Tile,
    pub(crate) bias: bool,
    /// Results in float32.
    pub(crate) wide: bool,
    pub(crate) seed: u64,
}

/// Elements of one product's weights, at most.
const MOST_WEIGHTS: usize = 1 << 20;

pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let experts = prop_oneof![2 => 1..=8_usize, 4 => 1..=300_usize, 1 => Just(384), 1 => Just(1024)];
    let flavour = prop_oneof![
        6 => Just(Flavour::Uniform),
        4 => Just(Flavour::Skewed),
        2 => Just(Flavour::OneChoice),
        2 => Just(Flavour::Dropped),
        1 => Just(Flavour::Nobody),
    ];
    let tokens = prop_oneof![1 => 0..=2_usize, 4 => 0..300_usize];
    (tokens, experts, 1..=32_usize, [1..=40_usize, 1..=40_usize], flavour, any_epilogue(), any::<u8>(), any::<u64>())
        .prop_map(|(num_tokens, experts, topk, sizes, flavour, epilogue, bits, seed)| {
            let most = MOST_WEIGHTS / experts;
            let d = (8 * sizes[0]).min(most / 16 / 8 * 8);
            let n = (8 * sizes[1]).min(most / (2 * d) / 8 * 8).max(8);
            let tile = TILES[usize::from(bits >> 2) % TILES.len()];
            let (bias, wide) = (bits & 1 != 0, bits & 2 != 0);
            let topk = topk.min(experts);
            Case { num_tokens, experts, topk, sizes: [d, n], flavour, epilogue, tile, bias, wide, seed }
        })
}

pub(crate) fn any_epilogue() -> impl Strategy<Value = Epilogue> {
    prop_oneof![
        3 => Just(Epilogue::SwiGlu),
        1 => Just(Epilogue::Linear),
        1 => Just(Epilogue::Relu),
        1 => Just(Epilogue::Gelu),
    ]
}

/// As often chosen as not.
const TILES: [Tile; 10] = [
    Tile::Auto,
    Tile::Rows16,
    Tile::Auto,
    Tile::Rows32,
    Tile::Auto,
    Tile::Rows64,
    Tile::Auto,
    Tile::Rows128,
    Tile::Auto,
    Tile::Rows128Wide,
];

impl Case {
    pub(crate) fn permutation(&self) -> Permutation {
        let mut noise = Noise(self.seed ^ 0x1d5);
        let mut ids = Vec::with_capacity(self.num_tokens * self.topk);
        for _ in 0..self.num_tokens {
            for slot in 0..self.topk {
                let u = noise.uniform();
                let any = |u: f32| (u * self.experts as f32) as i32 % self.experts as i32;
                ids.push(match self.flavour {
                    Flavour::Skewed => any(u * u * u * u),
                    Flavour::OneChoice => ((self.seed as usize + slot) % self.experts) as i32,
                    Flavour::Dropped if noise.bits().is_multiple_of(4) => -1,
                    Flavour::Uniform | Flavour::Dropped => any(u),
                    Flavour::Nobody => -1,
                });
            }
        }
        Permutation::new(&ids, self.topk, self.experts).unwrap()
    }

    pub(crate) fn x(&self) -> Vec<bf16> {
        noise(self.num_tokens * self.sizes[0], 1.0, self.seed ^ 0xa)
    }

    /// Such that products are of the size of x.
    pub(crate) fn up(&self) -> Vec<bf16> {
        let [d, n] = self.sizes;
        noise(self.experts * self.up_rows() * n * d, 3.0 / (d as f32).sqrt(), self.seed ^ 0xb)
    }

    pub(crate) fn up_rows(&self) -> usize {
        if self.epilogue == Epilogue::SwiGlu { 2 } else { 1 }
    }

    pub(crate) fn down(&self) -> Vec<bf16> {
        let [d, n] = self.sizes;
        noise(self.experts * d * n, 3.0 / (n as f32).sqrt(), self.seed ^ 0xc)
    }

    pub(crate) fn bias(&self) -> Option<Vec<f32>> {
        let values = || noise(self.experts * self.up_rows() * self.sizes[1], 1.0, self.seed ^ 0xd);
        self.bias.then(|| values().iter().map(|value| value.to_f32() + 1e-4).collect())
    }
}

/// Uniform in (-scale, scale).
pub(crate) fn noise(count: usize, scale: f32, seed: u64) -> Vec<bf16> {
    let mut noise = Noise(seed);
    (0..count).map(|_| bf16::from_f32((2.0 * noise.uniform() - 1.0) * scale)).collect()
}

pub(crate) fn floats(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

fn matrix(rows: usize, columns: usize, values: &[bf16]) -> Matrix<'_> {
    Matrix::new(Dtype::Bf16, rows, columns, bytemuck::cast_slice(values)).unwrap()
}

/// An expert whose gate and up lie one below the other, biases too.
fn swiglu<'a>(gate_up: Linear<'a>, down: Matrix<'a>) -> Expert<'a> {
    let n = gate_up.weight.rows() / 2;
    let part = |range: Range<usize>| Linear {
        weight: gate_up.weight.slice_rows(range.clone()).unwrap(),
        bias: gate_up.bias.map(|bias| &bias[range]),
    };
    Expert::SwiGlu { gate: part(0..n), up: part(n..2 * n), down: down.into() }
}

/// `epilogue(x W^T)` of one expert, by the reference: its second product is with the identity, which changes nothing.
pub(crate) fn product(
    x: &[f32],
    [depth, columns]: [usize; 2],
    weights: &[bf16],
    bias: Option<&[f32]>,
    epilogue: Epilogue,
) -> Vec<f32> {
    let mut identity = vec![0.0; columns * columns];
    identity.iter_mut().step_by(columns + 1).for_each(|value| *value = 1.0);
    let identity = Matrix::from_f32(columns, columns, &identity).unwrap();
    let rows = x.len() / depth;
    let up = |rows| Linear { weight: matrix(rows, depth, weights), bias };
    let expert = match epilogue {
        Epilogue::SwiGlu => swiglu(up(2 * columns), identity),
        Epilogue::Relu => Expert::Plain { activation: Activation::Relu, up: up(columns), down: identity.into() },
        Epilogue::Gelu => Expert::Plain { activation: Activation::Gelu, up: up(columns), down: identity.into() },
        _ => return anabranch::reference::linear(x, rows, &up(columns)).unwrap(),
    };
    expert_forward(x, rows, &expert).unwrap()
}

/// [`product`] of every expert with its segment of rows.
pub(crate) fn products(
    x: &[f32],
    [depth, columns]: [usize; 2],
    weights: &[bf16],
    bias: Option<&[f32]>,
    epilogue: Epilogue,
    permutation: &Permutation,
) -> Vec<f32> {
    let offsets = permutation.expert_offsets();
    let per_expert = weights.len() / (offsets.len() - 1);
    let mut y = Vec::new();
    for (expert, range) in offsets.windows(2).enumerate() {
        if range[0] < range[1] {
            let bias_rows = if epilogue == Epilogue::SwiGlu { 2 * columns } else { columns };
            let bias = bias.map(|bias| &bias[expert * bias_rows..][..bias_rows]);
            let weights = &weights[expert * per_expert..][..per_expert];
            y.extend(product(&x[range[0] * depth..range[1] * depth], [depth, columns], weights, bias, epilogue));
        }
    }
    y
}

/// Every expert whole, for [`anabranch::reference::grouped_gemm`].
pub(crate) fn experts<'a>(case: &Case, up: &'a [bf16], down: &'a [bf16], bias: Option<&'a [f32]>) -> Vec<Expert<'a>> {
    let [d, n] = case.sizes;
    let rows = case.up_rows() * n;
    (0..case.experts)
        .map(|expert| {
            let weight = matrix(rows, d, &up[expert * rows * d..][..rows * d]);
            let down = matrix(d, n, &down[expert * d * n..][..d * n]);
            let up = Linear { weight, bias: bias.map(|bias| &bias[expert * rows..][..rows]) };
            match case.epilogue {
                Epilogue::SwiGlu => swiglu(up, down),
                Epilogue::Relu => Expert::Plain { activation: Activation::Relu, up, down: down.into() },
                _ => Expert::Plain { activation: Activation::Gelu, up, down: down.into() },
            }
        })
        .collect()
}

/// How far a result may be off, relative to the reference: all of it, and its worst row.
#[derive(Clone, Copy)]
pub(crate) struct Bound {
    pub(crate) all: f64,
    pub(crate) row: f64,
}

/// One rounding to bf16, and what comes with it.
pub(crate) const BF16: Bound = Bound { all: 5e-3, row: 2e-2 };
/// Sums in float32, and activations from approximate instructions.
pub(crate) const F32: Bound = Bound { all: 1e-4, row: 1e-3 };

/// Compares rows of `columns` values. What is smaller than rounding in a sum of values near 1 counts for nothing.
pub(crate) fn close(got: &[f32], expected: &[f32], columns: usize, bound: Bound) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{} values, not {}", got.len(), expected.len()));
    }
    let (mut error, mut norm) = (0.0, 0.0);
    for (row, (got, expected)) in got.chunks_exact(columns).zip(expected.chunks_exact(columns)).enumerate() {
        let pairs = || got.iter().zip(expected).map(|(got, expected)| (f64::from(*got), f64::from(*expected)));
        let row_error: f64 = pairs().map(|(got, expected)| (got - expected).powi(2)).sum();
        let row_norm: f64 = pairs().map(|(_, expected)| expected.powi(2)).sum();
        let most = bound.row * row_norm.sqrt() + 1e-5 * (columns as f64).sqrt();
        if row_error.is_nan() || row_error.sqrt() > most {
            return Err(format!(
                "row {row} is off by {}, norm {}: {got:?}\nnot {expected:?}",
                row_error.sqrt(),
                row_norm.sqrt()
            ));
        }
        error += row_error;
        norm += row_norm;
    }
    let most = bound.all * f64::sqrt(norm) + 1e-5 * (got.len() as f64).sqrt();
    if f64::sqrt(error) <= most { Ok(()) } else { Err(format!("off by {} of {}", error.sqrt(), norm.sqrt())) }
}
