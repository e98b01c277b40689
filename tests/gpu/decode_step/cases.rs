//! Models for `decode_step`, and what the references make of them, one operation after another.

use anabranch::{
    GroupLimit, GroupScore, Renormalize, Rope, RopeLayout, RopeScaling, Routing, Score,
    cuda::DecodeShape,
    reference::{self, AttentionShape},
};
use half::bf16;
use proptest::prelude::*;

use crate::support::Noise;

/// A model, and the token's place in a sequence.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) shape: DecodeShape,
    pub(crate) rope: (usize, RopeLayout),
    /// Whether heads are normed.
    pub(crate) head_norms: bool,
    pub(crate) bias: bool,
    /// Layers that have experts, by bits.
    pub(crate) routed: u32,
    /// Keys of the sequence, the token's included.
    pub(crate) length: usize,
    pub(crate) block_size: usize,
    pub(crate) seed: u64,
}

/// A layer's weights and cache, as [`anabranch::cuda::DecodeLayer`] has them.
pub(crate) struct Layer {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) q: Vec<bf16>,
    pub(crate) kv: Vec<bf16>,
    pub(crate) q_norm: Vec<f32>,
    pub(crate) k_norm: Vec<f32>,
    pub(crate) absorb: Vec<bf16>,
    pub(crate) expand: Vec<bf16>,
    pub(crate) output: Vec<bf16>,
    pub(crate) k_cache: Vec<bf16>,
    pub(crate) v_cache: Vec<bf16>,
    pub(crate) feed_forward_norm: Vec<f32>,
    pub(crate) gate: Vec<bf16>,
    pub(crate) bias: Vec<f32>,
    pub(crate) gate_up: Vec<bf16>,
    pub(crate) down: Vec<bf16>,
    pub(crate) routes: bool,
}

pub(crate) struct Data {
    pub(crate) x: Vec<bf16>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) table: Vec<u32>,
    pub(crate) table_start: u32,
    /// Of every cache.
    pub(crate) rows: usize,
    /// The token's.
    pub(crate) row: usize,
}

/// What a step should leave behind.
pub(crate) struct Expected {
    pub(crate) x: Vec<f64>,
    /// New keys and values, layer by layer.
    pub(crate) keys: Vec<Vec<f64>>,
    pub(crate) values: Vec<Vec<f64>>,
    /// The smallest distance of a chosen expert's score from one that was not, in all layers.
    pub(crate) margin: f64,
}

impl Case {
    /// 2,400 columns of shared experts, more than two tiles of eight for each of an H200's blocks, and rows that all warps share.
    pub(crate) fn with_wide_shared_experts(seed: u64) -> Self {
        let attention = AttentionShape { num_heads: 4, num_kv_heads: 2, key_dim: 32, value_dim: 32, scale: 0.18 };
        let shape = DecodeShape {
            num_layers: 2,
            hidden_size: 1032,
            norm_eps: 1e-5,
            attention,
            latent: None,
            head_norm_eps: 1e-6,
            rotary_first: 0,
            routing: Some(Routing::builder(4, 2).build().unwrap()),
            num_shared: 2,
            intermediate_size: 1200,
            dense_size: 0,
        };
        let rope = (32, RopeLayout::Half);
        Self { shape, rope, head_norms: false, bias: false, routed: 0, length: 5, block_size: 64, seed }
    }

    pub(crate) fn rope(&self) -> Rope {
        Rope::new(self.rope.0, 10_000.0, self.rope.1, RopeScaling::None).unwrap()
    }

    pub(crate) fn routes(&self, layer: usize) -> bool {
        self.shape.routing.is_some() && (self.shape.dense_size == 0 || self.routed >> layer & 1 == 1)
    }

    pub(crate) fn data(&self) -> Data {
        let mut noise = Noise(self.seed);
        let size = self.block_size;
        // Blocks in no order, some of nobody, and numbers of no block around the table.
        let owned = self.length.div_ceil(size);
        let mut blocks: Vec<u32> = (0..owned as u32 + 2).collect();
        (1..blocks.len()).rev().for_each(|at| blocks.swap(at, (noise.bits() % (at as u64 + 1)) as usize));
        let rows = blocks.len() * size;
        let mut table = vec![u32::MAX; 3];
        table.extend(&blocks[..owned]);
        table.push(u32::MAX);
        let row_of = |position: usize| blocks[position / size] as usize * size + position % size;
        let layers = (0..self.shape.num_layers).map(|layer| self.layer(layer, &mut noise, rows, &row_of)).collect();
        let x = normals(&mut noise, self.shape.hidden_size, 1.0);
        Data { x, layers, table, table_start: 3, rows, row: row_of(self.length - 1) }
    }

    fn layer(&self, layer: usize, noise: &mut Noise, rows: usize, row_of: &dyn Fn(usize) -> usize) -> Layer {
        let DecodeShape { hidden_size: d, attention, latent, routing, num_shared, intermediate_size: n, .. } =
            self.shape;
        let AttentionShape { num_heads: heads, num_kv_heads, key_dim, value_dim, .. } = attention;
        let inverse = |width: usize| 1.0 / (width as f32).sqrt();
        let [q_dim, o_dim] = latent.unwrap_or([key_dim, value_dim]);
        let routes = self.routes(layer);
        let (experts, all, n) = match routing.filter(|_| routes) {
            Some(routing) => (routing.num_experts(), routing.num_experts() + num_shared, n),
            None => (0, 1, self.shape.dense_size),
        };
        let is_latent = latent.is_some();
        let q_rows = if is_latent { heads * q_dim } else { (heads + 2 * num_kv_heads) * key_dim };
        let only = |needed: bool, count: usize| if needed { count } else { 0 };
        let norm = |noise: &mut Noise, len: usize| (0..len).map(|_| 1.0 + 0.3 * noise.normal()).collect::<Vec<_>>();
        let cache = |noise: &mut Noise, width: usize| {
            // What the sequence does not have is NaN, and so is the token's own row.
            let mut values = vec![bf16::NAN; rows * width];
            for position in 0..self.length - 1 {
                let row = row_of(position) * width;
                values[row..row + width].copy_from_slice(&normals(noise, width, 1.0));
            }
            values
        };
        Layer {
            attention_norm: norm(noise, d),
            q: normals(noise, q_rows * d, inverse(d)),
            kv: normals(noise, only(is_latent, key_dim * d), inverse(d)),
            q_norm: norm(noise, only(self.head_norms && !is_latent, key_dim)),
            k_norm: norm(noise, if is_latent { value_dim } else { only(self.head_norms, key_dim) }),
            absorb: normals(noise, only(is_latent, heads * key_dim * q_dim), inverse(q_dim)),
            expand: normals(noise, only(is_latent, heads * o_dim * value_dim), inverse(value_dim)),
            output: normals(noise, d * heads * o_dim, inverse(heads * o_dim)),
            k_cache: cache(noise, num_kv_heads * key_dim),
            v_cache: cache(noise, only(!is_latent, num_kv_heads * value_dim)),
            feed_forward_norm: norm(noise, d),
            gate: normals(noise, experts * d, 3.0 * inverse(d)),
            bias: (0..only(self.bias, experts)).map(|_| 0.1 * noise.normal()).collect(),
            gate_up: normals(noise, all * 2 * n * d, inverse(d)),
            down: normals(noise, all * d * n, inverse(n)),
            routes,
        }
    }

    /// The references, with what the kernel multiplies rounded as it rounds it.
    pub(crate) fn expected(&self, data: &Data) -> Expected {
        let mut x: Vec<f64> = data.x.iter().map(|x| x.to_f64()).collect();
        let mut expected = Expected { x: Vec::new(), keys: Vec::new(), values: Vec::new(), margin: f64::INFINITY };
        let size = self.block_size;
        let row_of =
            |position: usize| data.table[data.table_start as usize + position / size] as usize * size + position % size;
        let angles = reference::RopeTable::new(&self.rope(), [self.length - 1]);
        for layer in &data.layers {
            let attended = self.attend(layer, &x, &angles, &row_of, &mut expected);
            add(&mut x, &times(&layer.output, &attended));
            let delta = self.feed_forward(layer, &x, &mut expected.margin);
            add(&mut x, &delta);
        }
        expected.x = x;
        expected
    }

    fn attend(
        &self,
        layer: &Layer,
        x: &[f64],
        angles: &reference::RopeTable,
        row_of: &dyn Fn(usize) -> usize,
        expected: &mut Expected,
    ) -> Vec<f64> {
        let AttentionShape { num_heads: heads, num_kv_heads, key_dim, value_dim, .. } = self.shape.attention;
        let (first, eps) = (self.shape.rotary_first, self.shape.head_norm_eps);
        let x = rounded(reference::rms_norm(x, &layer.attention_norm, self.shape.norm_eps).unwrap());
        let mut q = times(&layer.q, &x);
        let (mut k, v);
        if let Some([q_dim, _]) = self.shape.latent {
            q = by_head(&layer.absorb, &rounded(q), heads, q_dim);
            q = rounded(q);
            k = times(&layer.kv, &x);
            v = Vec::new();
        } else {
            let rest = q.split_off(heads * key_dim);
            let (keys, values) = rest.split_at(num_kv_heads * key_dim);
            (k, v) = (keys.to_vec(), rounded(values.to_vec()));
        }
        if !layer.q_norm.is_empty() {
            reference::rms_norm_heads(&mut q, key_dim, &layer.q_norm, eps).unwrap();
        }
        if !layer.k_norm.is_empty() {
            reference::rms_norm_heads(&mut k, key_dim, &layer.k_norm, eps).unwrap();
        }
        reference::rotate(&mut q, heads, key_dim, first, angles).unwrap();
        reference::rotate(&mut k, num_kv_heads, key_dim, first, angles).unwrap();
        let (q, k) = (rounded(q), rounded(k));
        let gather = |cache: &[bf16], width: usize, new: &[f64]| {
            let rows = (0..self.length - 1).flat_map(|position| &cache[row_of(position) * width..][..width]);
            rows.map(|value| value.to_f64()).chain(new.iter().copied()).collect::<Vec<_>>()
        };
        let widths = [num_kv_heads * key_dim, num_kv_heads * value_dim];
        let keys = gather(&layer.k_cache, widths[0], &k);
        let attended = if self.shape.latent.is_some() {
            reference::attention(&self.shape.attention, &q, [&keys, &keys], [widths[0]; 2]).unwrap()
        } else {
            let values = gather(&layer.v_cache, widths[1], &v);
            reference::attention(&self.shape.attention, &q, [&keys, &values], widths).unwrap()
        };
        expected.keys.push(k);
        expected.values.push(v);
        let attended = rounded(attended);
        if self.shape.latent.is_none() {
            return attended;
        }
        rounded(by_head(&layer.expand, &attended, heads, value_dim))
    }

    fn feed_forward(&self, layer: &Layer, x: &[f64], margin: &mut f64) -> Vec<f64> {
        let d = self.shape.hidden_size;
        let x = rounded(reference::rms_norm(x, &layer.feed_forward_norm, self.shape.norm_eps).unwrap());
        let mut slots = Vec::new();
        let mut n = self.shape.dense_size;
        match self.shape.routing.filter(|_| layer.routes) {
            None => slots.push((0, 1.0)),
            Some(routing) => {
                n = self.shape.intermediate_size;
                let experts = routing.num_experts();
                slots.extend((experts..experts + self.shape.num_shared).map(|expert| (expert, 1.0)));
                let logits = times(&layer.gate, &x);
                let bias = (!layer.bias.is_empty()).then_some(layer.bias.as_slice());
                let routed = reference::router(&routing, &logits, bias, None).unwrap();
                let pairs = routed.topk_ids.iter().zip(&routed.topk_weights).filter(|(id, _)| **id >= 0);
                slots.extend(pairs.map(|(id, weight)| (*id as usize, *weight)));
                *margin = margin.min(margin_of(&routing, &logits, bias, &routed.topk_ids));
            }
        }
        let mut out = vec![0.0; d];
        for (expert, weight) in slots {
            let [gate, up] = [0, 1].map(|half| times(&layer.gate_up[(2 * expert + half) * n * d..][..n * d], &x));
            let h = gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up);
            let y = times(&layer.down[expert * n * d..][..n * d], &rounded(h.collect()));
            out.iter_mut().zip(y).for_each(|(out, y)| *out += weight * y);
        }
        out
    }
}

/// How far the choice is from another: by moving each logit a little up and down.
fn margin_of(routing: &Routing, logits: &[f64], bias: Option<&[f32]>, chosen: &[i32]) -> f64 {
    let ids = |ids: &[i32]| {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids
    };
    let chosen = ids(chosen);
    let flips = |step: f64| {
        (0..logits.len()).any(|at| {
            let mut moved = logits.to_vec();
            moved[at] += step;
            ids(&reference::router(routing, &moved, bias, None).unwrap().topk_ids) != chosen
        })
    };
    [0.01, 0.02, 0.04, 0.08].into_iter().find(|step| flips(*step) || flips(-*step)).unwrap_or(1.0)
}

fn normals(noise: &mut Noise, count: usize, scale: f32) -> Vec<bf16> {
    (0..count).map(|_| bf16::from_f32(scale * noise.normal())).collect()
}

fn rounded(values: Vec<f64>) -> Vec<f64> {
    values.into_iter().map(|value| bf16::from_f64(value).to_f64()).collect()
}

fn add(x: &mut [f64], delta: &[f64]) {
    x.iter_mut().zip(delta).for_each(|(x, delta)| *x += delta);
}

/// `W x`.
fn times(weights: &[bf16], x: &[f64]) -> Vec<f64> {
    let dot = |row: &[bf16]| row.iter().zip(x).map(|(weight, x)| weight.to_f64() * x).sum();
    weights.chunks_exact(x.len()).map(dot).collect()
}

/// Each head's part of x by its own weights.
fn by_head(weights: &[bf16], x: &[f64], heads: usize, width: usize) -> Vec<f64> {
    weights.chunks_exact(weights.len() / heads).zip(x.chunks_exact(width)).flat_map(|(w, x)| times(w, x)).collect()
}

fn any_routing() -> impl Strategy<Value = Routing> {
    let score = prop_oneof![Just(Score::Softmax), Just(Score::Sigmoid), Just(Score::TopkSoftmax)];
    (prop_oneof![1..=8_usize, 30..=33_usize, 60..=66_usize], 1..=8_usize, score, any::<bool>(), any::<bool>()).prop_map(
        |(half, topk, score, sums, grouped)| {
            let experts = 2 * half;
            let renormalize = if sums { Renormalize::Sum } else { Renormalize::None };
            let rule = Routing::builder(experts, topk.min(experts)).score(score).renormalize(renormalize).scale(1.5);
            let limit = GroupLimit { n_group: 2, topk_group: 1, score: GroupScore::Max };
            let rule = if grouped && topk <= half { rule.group_limit(limit) } else { rule };
            rule.build().unwrap()
        },
    )
}

fn grouped() -> impl Strategy<Value = (AttentionShape, Option<[usize; 2]>, usize, usize)> {
    let dims = prop_oneof![Just(16_usize), Just(32), Just(64), Just(128)];
    (1..=4_usize, prop_oneof![Just(1_usize), Just(2), Just(3), Just(8), Just(16)], dims, any::<bool>()).prop_map(
        |(num_kv_heads, group, dim, whole)| {
            let scale = 1.0 / (dim as f32).sqrt();
            let num_heads = num_kv_heads * group;
            let shape = AttentionShape { num_heads, num_kv_heads, key_dim: dim, value_dim: dim, scale };
            (shape, None, 0, if whole { dim } else { dim / 2 })
        },
    )
}

fn latent() -> impl Strategy<Value = (AttentionShape, Option<[usize; 2]>, usize, usize)> {
    let widths = prop_oneof![Just((32_usize, 16_usize)), Just((64, 32)), Just((512, 64))];
    (prop_oneof![Just(1_usize), Just(4), Just(5), Just(16)], widths, 1..=3_usize, 1..=4_usize).prop_map(
        |(num_heads, (value_dim, rotary), q, o)| {
            let key_dim = value_dim + rotary;
            let scale = 1.0 / (key_dim as f32).sqrt();
            let shape = AttentionShape { num_heads, num_kv_heads: 1, key_dim, value_dim, scale };
            (shape, Some([rotary + 8 * q, 8 * o]), value_dim, rotary)
        },
    )
}

pub(crate) fn any_case() -> impl Strategy<Value = Case> {
    let attention = prop_oneof![2 => grouped().boxed(), 1 => latent().boxed()];
    let hidden = prop_oneof![Just(8_usize), Just(64), Just(72), Just(256), Just(1032), Just(2048)];
    let length = prop_oneof![1..=3_usize, 30..=34_usize, 62..=67_usize, 100..=300_usize, 700..=1500_usize];
    let layout = prop_oneof![Just(RopeLayout::Half), Just(RopeLayout::Interleaved)];
    let feed_forward = (proptest::option::weighted(0.8, any_routing()), 0..=2_usize, 1..=12_usize, 0..=40_usize);
    let flags = (any::<bool>(), any::<bool>(), any::<u32>());
    (
        1..=3_usize,
        hidden,
        attention,
        feed_forward,
        length,
        layout,
        flags,
        prop_oneof![Just(64_usize), Just(256)],
        any::<u64>(),
    )
        .prop_map(|(num_layers, hidden_size, attention, feed_forward, length, layout, flags, block_size, seed)| {
            let (attention, latent, rotary_first, rotary) = attention;
            let (routing, num_shared, n, dense) = feed_forward;
            let dense = if routing.is_none() { dense.max(1) } else { dense };
            let shape = DecodeShape {
                num_layers,
                hidden_size,
                norm_eps: 1e-5,
                attention,
                latent,
                head_norm_eps: 1e-6,
                rotary_first,
                routing,
                num_shared,
                intermediate_size: 8 * n,
                dense_size: 8 * dense,
            };
            let (head_norms, bias, routed) = flags;
            Case { shape, rope: (rotary, layout), head_norms, bias, routed, length, block_size, seed }
        })
}
