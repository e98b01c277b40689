//! What `moe_layer` is tried on, what the reference makes of it, and how results are compared.

use std::sync::LazyLock;

use anabranch::{
    Adaptive, Capacity, Dtype, GroupLimit, GroupScore, Renormalize, Routing, Score,
    cuda::MoeShape,
    reference::{self, Expert, Matrix, Permutation},
};
use half::bf16;
use proptest::prelude::*;

use crate::support::Noise;

/// One layer and the tokens to send through it.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) routing: Routing,
    pub(crate) num_tokens: usize,
    /// Tokens that the layer is planned for beyond those that come.
    pub(crate) spare: usize,
    /// d and n.
    pub(crate) sizes: [usize; 2],
    pub(crate) num_shared: usize,
    pub(crate) shared_gate: bool,
    pub(crate) choice: Choice,
    /// Whether a selection bias is given.
    pub(crate) bias: bool,
    pub(crate) seed: u64,
}

/// Who visits whom.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Choice {
    /// By normal logits.
    Normal,
    /// By logits that fall with the expert's number: few experts have most tokens.
    Skewed,
    /// All tokens prefer the same experts.
    One,
    /// Half of the experts are never chosen, where there are enough others.
    Empty,
    /// Given: random ids, some of no expert.
    Given,
    /// Given: a token may visit an expert more than once.
    Repeated,
    /// Given: every pair goes to one expert.
    GivenOne,
    /// Given: no pair goes anywhere.
    Nobody,
}

impl Choice {
    pub(crate) fn is_given(self) -> bool {
        matches!(self, Self::Given | Self::Repeated | Self::GivenOne | Self::Nobody)
    }
}

/// A prime number of normal values: what arrays repeat, because some have millions.
static NORMALS: LazyLock<Vec<f32>> = LazyLock::new(|| {
    let mut noise = Noise(20_261_124);
    (0..65_537).map(|_| noise.normal()).collect()
});

fn normals(seed: u64, count: usize, scale: f32) -> Vec<bf16> {
    let start = (Noise(seed).bits() % NORMALS.len() as u64) as usize;
    NORMALS.iter().cycle().skip(start).take(count).map(|value| bf16::from_f32(value * scale)).collect()
}

pub(crate) fn floats(values: &[bf16]) -> Vec<f32> {
    values.iter().map(|value| value.to_f32()).collect()
}

/// A layer's weights: `[E + S, 2 n, d]` and `[E + S, d, n]`.
pub(crate) struct Weights {
    pub(crate) gate_up: Vec<bf16>,
    pub(crate) down: Vec<bf16>,
}

impl Case {
    pub(crate) fn shape(&self) -> MoeShape {
        let [hidden_size, intermediate_size] = self.sizes;
        MoeShape { routing: self.routing, hidden_size, intermediate_size, num_shared: self.num_shared }
    }

    pub(crate) fn x(&self) -> Vec<bf16> {
        normals(self.seed ^ 1, self.num_tokens * self.sizes[0], 1.0)
    }

    pub(crate) fn weights(&self) -> Weights {
        let [d, n] = self.sizes;
        let experts = self.routing.num_experts() + self.num_shared;
        Weights {
            gate_up: normals(self.seed ^ 2, experts * 2 * n * d, (d as f32).powf(-0.5)),
            down: normals(self.seed ^ 3, experts * d * n, (n as f32).powf(-0.5)),
        }
    }

    pub(crate) fn logits(&self) -> Vec<f32> {
        let experts = self.routing.num_experts();
        let mut noise = Noise(self.seed ^ 4);
        let lift = |expert: usize| match self.choice {
            Choice::Skewed => -1.5 * (expert as f32 + 1.0).ln(),
            Choice::One => -0.25 * expert as f32 * expert as f32,
            Choice::Empty if expert % 2 == 1 => -30.0,
            _ => 0.0,
        };
        (0..self.num_tokens * experts).map(|at| noise.normal() + lift(at % experts)).collect()
    }

    pub(crate) fn selection_bias(&self) -> Option<Vec<f32>> {
        let mut noise = Noise(self.seed ^ 5);
        self.bias.then(|| (0..self.routing.num_experts()).map(|_| noise.normal() / 8.0).collect())
    }

    pub(crate) fn gate(&self) -> Option<Vec<f32>> {
        let mut noise = Noise(self.seed ^ 6);
        let given = self.shared_gate && self.num_shared > 0;
        given.then(|| (0..self.num_tokens).map(|_| noise.normal()).collect())
    }

    /// Ids and weights, where they are given. What stands beside an id of no expert must not matter.
    pub(crate) fn given(&self) -> (Vec<i32>, Vec<f32>) {
        let (experts, topk) = (self.routing.num_experts(), self.routing.topk());
        let mut noise = Noise(self.seed ^ 7);
        let nobody = [-1, experts as i32, i32::MAX, i32::MIN];
        let mut ids: Vec<i32> = Vec::with_capacity(self.num_tokens * topk);
        for at in 0..self.num_tokens * topk {
            let token = &ids[at / topk * topk..];
            let mut id = (noise.bits() % experts as u64) as i32;
            if self.choice == Choice::Given {
                while token.contains(&id) {
                    id = (id + 1) % experts as i32;
                }
            }
            let lost =
                self.choice == Choice::Nobody || (self.choice == Choice::Given && noise.bits().is_multiple_of(8));
            ids.push(match self.choice {
                _ if lost => nobody[noise.bits() as usize % nobody.len()],
                Choice::GivenOne => (self.seed % experts as u64) as i32,
                _ => id,
            });
        }
        // Of one sign where a token's pairs have the same answer: a sum that cancels would show rounding alone.
        let weight = |id: &i32| match self.choice {
            _ if !(0..experts as i32).contains(id) => f32::NAN,
            Choice::Given => noise.normal(),
            _ => noise.uniform(),
        };
        let weights = ids.iter().map(weight).collect();
        (ids, weights)
    }

    /// The layer's output for the tokens `tokens`, float32, from the whole batch's ids and weights.
    pub(crate) fn expected(
        &self,
        tokens: &[usize],
        x: &[bf16],
        ids: &[i32],
        weights: &[f32],
        of: &Weights,
    ) -> Vec<f32> {
        let ([d, n], topk, experts) = (self.sizes, self.routing.topk(), self.routing.num_experts());
        let pick = |values: &mut dyn FnMut(usize)| tokens.iter().for_each(|token| values(*token));
        let (mut rows, mut chosen, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        pick(&mut |token| rows.extend(x[token * d..(token + 1) * d].iter().map(|value| value.to_f32())));
        pick(&mut |token| chosen.extend_from_slice(&ids[token * topk..(token + 1) * topk]));
        pick(&mut |token| scales.extend_from_slice(&weights[token * topk..(token + 1) * topk]));
        chosen.iter_mut().for_each(|id| *id = if (0..experts as i32).contains(id) { *id } else { -1 });

        let (gate_up, down): (&[u8], &[u8]) = (bytemuck::cast_slice(&of.gate_up), bytemuck::cast_slice(&of.down));
        let expert = |index: usize| {
            let gate_up = &gate_up[index * 4 * n * d..(index + 1) * 4 * n * d];
            let down = &down[index * 2 * n * d..(index + 1) * 2 * n * d];
            let gate_up = Matrix::new(Dtype::Bf16, 2 * n, d, gate_up).unwrap();
            Expert::swiglu_stacked(gate_up, Matrix::new(Dtype::Bf16, d, n, down).unwrap()).unwrap()
        };
        let permutation = Permutation::new(&chosen, topk, experts).unwrap();
        let routed: Vec<Expert<'_>> = (0..experts).map(expert).collect();
        let y = reference::grouped_gemm(&rows, d, &routed, &permutation).unwrap();
        let mut out = reference::combine(&y, &scales, &permutation, d).unwrap();
        let gate = self.gate();
        for shared in experts..experts + self.num_shared {
            let y = reference::expert_forward(&rows, tokens.len(), &expert(shared)).unwrap();
            for ((out, y), token) in out.chunks_exact_mut(d).zip(y.chunks_exact(d)).zip(tokens) {
                let gate = gate.as_ref().map_or(1.0, |gate| 1.0 / (1.0 + (-gate[*token]).exp()));
                out.iter_mut().zip(y).for_each(|(out, y)| *out += gate * y);
            }
        }
        out
    }
}

/// Relative Frobenius error of all rows at most `all`, of each row at most `row`; a row of zeros exactly.
pub(crate) fn close(got: &[f32], expected: &[f32], width: usize, all: f64, row: f64) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{} values where {} belong", got.len(), expected.len()));
    }
    let (mut error, mut norm) = (0.0, 0.0);
    for (at, (got, expected)) in got.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate() {
        let square = |value: f64| value * value;
        let row_error: f64 = got.iter().zip(expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
        let row_norm: f64 = expected.iter().map(|b| square(f64::from(*b))).sum();
        if row_error.is_nan() || row_error.sqrt() > row * row_norm.sqrt() {
            let relative = (row_error / row_norm).sqrt();
            return Err(format!("row {at} is off by {relative:e}: {:?} not {:?}", &got[..8], &expected[..8]));
        }
        error += row_error;
        norm += row_norm;
    }
    if error.sqrt() <= all * norm.sqrt() {
        return Ok(());
    }
    Err(format!("relative error {:e}", (error / norm).sqrt()))
}

/// Elements of weights that a case may have: most of its time goes into making them.
const MOST_WEIGHTS: usize = 3 << 20;

/// Any layer: up to 300 tokens, 1,024 experts, 32 of them a token.
pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let eighths = || {
        prop_oneof![
            6 => 1..=25_usize,
            2 => prop::sample::select(vec![2, 8, 16, 24, 32]),
            1 => prop::sample::select(vec![33, 40, 63, 64, 65, 96, 128]),
        ]
    };
    let experts = prop_oneof![
        4 => 1..=300_usize,
        2 => 1..=16_usize,
        2 => prop::sample::select(vec![8, 60, 64, 96, 128, 160, 256, 384]),
        1 => Just(1024_usize),
    ];
    let tokens = prop_oneof![
        3 => 0..300_usize,
        3 => 0..20_usize,
        2 => prop::sample::select(vec![1, 2, 7, 8, 9, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257]),
    ];
    let choice = prop_oneof![
        4 => Just(Choice::Normal),
        2 => Just(Choice::Skewed),
        1 => Just(Choice::One),
        1 => Just(Choice::Empty),
        2 => Just(Choice::Given),
        1 => Just(Choice::Repeated),
        1 => Just(Choice::GivenOne),
        1 => Just(Choice::Nobody),
    ];
    let spare = prop_oneof![3 => Just(0_usize), 1 => 1..600_usize];
    let flags = (0..=2_usize, any::<bool>(), any::<bool>(), any::<u64>());
    (experts.prop_flat_map(any_routing), tokens, spare, [eighths(), eighths()], choice, flags).prop_map(
        |(routing, num_tokens, spare, [d, n], choice, (shared, shared_gate, bias, seed))| {
            let (experts, topk) = (routing.num_experts(), routing.topk());
            let sizes = fitting([8 * d, 8 * n], experts);
            let num_shared = shared.min(1024 - experts).min(32 - topk);
            let bias = bias && !choice.is_given();
            Case { routing, num_tokens, spare, sizes, num_shared, shared_gate, choice, bias, seed }
        },
    )
}

/// The larger size cut until the weights are few enough.
fn fitting([d, n]: [usize; 2], experts: usize) -> [usize; 2] {
    if 3 * d * n * experts <= MOST_WEIGHTS {
        return [d, n];
    }
    let cut = |size: usize| (size / 16 * 8).max(8);
    if d > n { fitting([cut(d), n], experts) } else { fitting([d, cut(n)], experts) }
}

/// Every rule of dropless routers, and some that drop.
fn any_routing(experts: usize) -> impl Strategy<Value = Routing> {
    let score = prop::sample::select(vec![Score::Softmax, Score::Sigmoid, Score::TopkSoftmax]);
    let renormalize = prop::sample::select(vec![Renormalize::None, Renormalize::Sum]);
    let capacity = prop_oneof![
        6 => Just(None),
        1 => (0.2..2.0).prop_map(|factor| Some(Capacity::Factor(factor))),
    ];
    let adaptive = prop_oneof![5 => Just(Adaptive::Fixed), 1 => Just(Adaptive::Entropy)];
    let topk = prop_oneof![2 => 1..=experts.min(8), 1 => 1..=experts.min(32)];
    let scale = prop::sample::select(vec![1.0_f32, 2.5]);
    (topk, score, renormalize, capacity, adaptive, scale, any::<bool>()).prop_map(
        move |(topk, score, renormalize, capacity, adaptive, scale, grouped)| {
            let mut routing =
                Routing::builder(experts, topk).score(score).renormalize(renormalize).adaptive(adaptive).scale(scale);
            if grouped && experts.is_multiple_of(8) && topk <= experts / 2 {
                routing = routing.group_limit(GroupLimit { n_group: 4, topk_group: 2, score: GroupScore::Top2Sum });
            }
            if let Some(capacity) = capacity {
                routing = routing.capacity(capacity);
            }
            routing.build().unwrap()
        },
    )
}
