//! rope: queries in place, keys and values into the cache.

use anabranch::{
    Rope, RopeLayout, RopeScaling,
    cuda::{HeadNorm, HeadRange, RopeBuffers, RopeCache, RopeTable, Stream, rms_norm_heads_into, rope_into},
    reference,
};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use crate::{
    numbers::{BF16, bits, capture, close, normals, widen},
    support::{Guarded, Noise, on_gpu, runner},
};

const POISON: bf16 = bf16::from_f32_const(-77.0);
const EPS: f32 = 1e-6;

/// Heads of one kind.
#[derive(Debug, Clone, Copy)]
struct Part {
    num_heads: usize,
    head_dim: usize,
    /// The first rotated element.
    first: usize,
    /// How many of a head's first elements are normed.
    norm: Option<usize>,
}

#[derive(Debug, Clone)]
struct Case {
    rope: Rope,
    num_tokens: usize,
    q: Part,
    k: Part,
    v: Part,
    /// All three in one matrix's rows.
    fused: bool,
    /// Columns before the first head: sixteen bytes, or less.
    pad: usize,
    clip: Option<f32>,
    most_position: usize,
    seed: u64,
}

fn any_rope() -> impl Strategy<Value = Rope> {
    let rotary = prop_oneof![prop::sample::select(vec![16, 32, 64, 128]), (1..20_usize).prop_map(|half| 2 * half)];
    let layout = prop::sample::select(vec![RopeLayout::Half, RopeLayout::Interleaved]);
    let yarn = RopeScaling::Yarn {
        factor: 40.0,
        original_context: 4096,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: 1.3,
    };
    (rotary, layout, prop::sample::select(vec![RopeScaling::None, yarn]), prop::sample::select(vec![1e4, 1e6]))
        .prop_map(|(rotary, layout, scaling, theta)| Rope::new(rotary, theta, layout, scaling).unwrap())
}

fn any_part(rotary: usize) -> impl Strategy<Value = Part> {
    // Elements before and after the rotated ones: whole vectors, or not.
    let rest = || prop_oneof![Just(0), Just(8), Just(64), 1..9_usize];
    (1..9_usize, rest(), rest()).prop_flat_map(move |(num_heads, before, after)| {
        let head_dim = before + rotary + after;
        let latent = if before > 0 { Some(before) } else { None };
        let norm = prop_oneof![Just(None), Just(Some(head_dim)), Just(latent), (1..=head_dim).prop_map(Some)];
        norm.prop_map(move |norm| Part { num_heads, head_dim, first: before, norm })
    })
}

fn any_case() -> impl Strategy<Value = Case> {
    any_rope().prop_flat_map(|rope| {
        let rotary = rope.rotary_dim();
        let parts = (any_part(rotary), any_part(rotary), any_part(rotary), any::<bool>());
        let clip = prop::sample::select(vec![None, None, Some(1.0)]);
        let most = prop::sample::select(vec![10, 4096, 200_000]);
        let pad = prop::sample::select(vec![0, 8, 1]);
        (parts, 0..60_usize, any::<bool>(), pad, clip, most, any::<u64>()).prop_map(
            move |((q, k, v, values), num_tokens, fused, pad, clip, most_position, seed)| {
                let v = Part { num_heads: if values { v.num_heads } else { 0 }, norm: None, ..v };
                Case { rope, num_tokens, q, k, v, fused, pad, clip, most_position, seed }
            },
        )
    })
}

impl Part {
    fn at(self, column: usize) -> HeadRange {
        HeadRange { column, num_heads: self.num_heads, head_dim: self.head_dim }
    }

    fn width(self) -> usize {
        self.num_heads * self.head_dim
    }
}

/// A case's matrices, positions and cache rows, on the host.
struct Values {
    /// Where queries, keys and values begin in their rows.
    columns: [usize; 3],
    /// Rows' lengths.
    widths: [usize; 3],
    /// One matrix if fused, else three.
    matrices: Vec<Vec<bf16>>,
    positions: Vec<i32>,
    rows: Vec<i32>,
    capacity: usize,
    /// Of the queries' norm and the keys'.
    weights: [Vec<f32>; 2],
}

impl Case {
    fn parts(&self) -> [Part; 3] {
        [self.q, self.k, self.v]
    }

    fn values(&self) -> Values {
        let mut noise = Noise(self.seed);
        let [q, k, v] = self.parts().map(Part::width);
        let (columns, widths) = if self.fused {
            // The values first: no order is special.
            ([self.pad + v, self.pad + v + q, self.pad], [self.pad + v + q + k; 3])
        } else {
            ([self.pad; 3], [q, k, v].map(|width| self.pad + width))
        };
        let matrices = if self.fused { 1 } else { 3 };
        let capacity = self.num_tokens + 5;
        // Distinct rows in any order; some tokens are not cached.
        let mut rows: Vec<i32> = (0..capacity as i32).collect();
        for at in (1..rows.len()).rev() {
            rows.swap(at, noise.bits() as usize % (at + 1));
        }
        rows.truncate(self.num_tokens);
        for row in &mut rows {
            if noise.bits().is_multiple_of(8) {
                *row = [-1, capacity as i32, i32::MAX][noise.bits() as usize % 3];
            }
        }
        Values {
            columns,
            widths,
            matrices: (0..matrices).map(|i| normals(&mut noise, self.num_tokens * widths[i])).collect(),
            positions: (0..self.num_tokens).map(|_| (noise.bits() % self.most_position as u64) as i32).collect(),
            rows,
            capacity,
            weights: [self.q, self.k]
                .map(|part| (0..part.norm.unwrap_or(0)).map(|_| 1.0 + 0.3 * noise.normal()).collect()),
        }
    }

    /// One part's heads of every token, in float64, as they must come out.
    fn expected(&self, values: &Values, index: usize) -> Vec<f64> {
        let part = self.parts()[index];
        let matrix = &values.matrices[if self.fused { 0 } else { index }];
        let columns = values.columns[index]..values.columns[index] + part.width();
        let mut x: Vec<f64> =
            matrix.chunks_exact(values.widths[index].max(1)).flat_map(|row| widen(&row[columns.clone()])).collect();
        if part.norm.is_some() {
            reference::rms_norm_heads(&mut x, part.head_dim, &values.weights[index], EPS).unwrap();
        }
        if let Some(clip) = self.clip {
            x.iter_mut().for_each(|x| *x = x.clamp(-f64::from(clip), f64::from(clip)));
        }
        if index < 2 {
            let table = reference::RopeTable::new(&self.rope, values.positions.iter().map(|p| *p as usize));
            reference::rotate(&mut x, part.num_heads, part.head_dim, part.first, &table).unwrap();
        }
        x
    }

    /// The element that one of a part's turns with.
    fn partner(&self, part: Part, at: usize) -> Option<usize> {
        let (pairs, within) = (self.rope.rotary_dim() / 2, at % part.head_dim);
        let rotated = within.checked_sub(part.first).filter(|rotated| *rotated < 2 * pairs)?;
        let halves = self.rope.layout() == RopeLayout::Half;
        let other = if halves { (rotated + pairs) % (2 * pairs) } else { rotated ^ 1 };
        Some(at - rotated + other)
    }

    /// How far an element may be off: one rounding, float32's of two products of what is at most 6 in size, and where a norm was
    /// rounded before, as much again of the pair's length: `|a cos| + |b sin|` is at most that.
    fn bound(&self, part: Part, expected: &[f64], at: usize) -> f64 {
        let value = expected[at];
        let turned = match self.partner(part, at) {
            Some(partner) if part.norm.is_some() => value.hypot(expected[partner]),
            _ => 0.0,
        };
        BF16 * (value.abs() + (1.0 + BF16) * turned) + 2e-5
    }
}

struct Call {
    table: RopeTable,
    matrices: Vec<Guarded<bf16>>,
    positions: Guarded<i32>,
    rows: Guarded<i32>,
    caches: [Guarded<bf16>; 2],
    weights: [Guarded<f32>; 2],
}

impl Call {
    fn new(stream: &Stream, case: &Case, values: &Values) -> Self {
        let matrix = |(i, matrix): (usize, &Vec<bf16>)| {
            Guarded::holding(stream, [case.num_tokens, values.widths[i]], matrix, POISON, 0)
        };
        let cache = |part: Part| Guarded::new(stream, [values.capacity, part.num_heads, part.head_dim], POISON, 0);
        Self {
            table: RopeTable::new(stream, &case.rope).unwrap(),
            matrices: values.matrices.iter().enumerate().map(matrix).collect(),
            positions: Guarded::holding(stream, [case.num_tokens], &values.positions, 1, 1),
            rows: Guarded::holding(stream, [case.num_tokens], &values.rows, 0, 3),
            caches: [cache(case.k), cache(case.v)],
            // As badly aligned as the heads.
            weights: [0, 1].map(|i| {
                let weight = &values.weights[i];
                Guarded::holding(stream, [weight.len()], weight, 0.0, case.pad % 8)
            }),
        }
    }

    fn launch(&mut self, stream: &Stream, case: &Case, values: &Values) {
        let (queries, others) = self.matrices.split_first_mut().unwrap();
        let [k_cache, v_cache] = &mut self.caches;
        let weights = &self.weights;
        let norm = |part: Part, i: usize| part.norm.map(|_| HeadNorm { weight: weights[i].view(), eps: EPS });
        let [q, k, v] = values.columns;
        let cache = RopeCache {
            keys: others.first().map(|keys| keys.view()),
            k: case.k.at(k),
            k_first: case.k.first,
            k_norm: norm(case.k, 1),
            values: others.get(1).map(|values| values.view()),
            v: case.v.at(v),
            rows: self.rows.view(),
            k_cache: k_cache.view_mut(),
            v_cache: v_cache.view_mut(),
        };
        let mut buffers = RopeBuffers {
            positions: self.positions.view(),
            queries: queries.view_mut(),
            q: case.q.at(q),
            q_first: case.q.first,
            q_norm: norm(case.q, 0),
            cache: Some(cache),
            clip: case.clip,
        };
        rope_into(stream, &self.table, &mut buffers).unwrap();
    }

    /// All matrices and both caches, once nothing around them is found changed.
    fn read(&self, stream: &Stream) -> Vec<Vec<bf16>> {
        self.matrices.iter().chain(&self.caches).map(|buffer| buffer.read(stream)).collect()
    }
}

fn check_case(stream: &Stream, case: &Case) -> Result<(), String> {
    let values = case.values();
    let run = || {
        let mut call = Call::new(stream, case, &values);
        call.launch(stream, case, &values);
        call.read(stream)
    };
    let got = run();
    if got.iter().zip(run()).any(|(a, b)| bits(a) != bits(&b)) {
        return Err("the same call twice gave different bits".to_owned());
    }
    // The queries' matrix: heads rotated, all else as it was; the others unchanged.
    let (columns, width) = (values.columns[0]..values.columns[0] + case.q.width(), values.widths[0]);
    let mut queries = Vec::new();
    for (at, (got, before)) in got[0].iter().zip(&values.matrices[0]).enumerate() {
        if columns.contains(&(at % width)) {
            queries.push(got.to_f64());
        } else if got.to_bits() != before.to_bits() {
            return Err(format!("element {at} beside the queries changed"));
        }
    }
    let expected = case.expected(&values, 0);
    close(&queries, &expected, |at, _| case.bound(case.q, &expected, at))?;
    for (got, before) in got.iter().zip(&values.matrices).skip(1) {
        if bits(got) != bits(before) {
            return Err("keys or values changed at their source".to_owned());
        }
    }
    for (index, part) in [(1, case.k), (2, case.v)] {
        let cache = &got[got.len() - 3 + index];
        let width = part.width();
        let mut expected = vec![POISON.to_f64(); values.capacity * width];
        for (token, new) in case.expected(&values, index).chunks_exact(width.max(1)).enumerate() {
            if let Ok(row) = usize::try_from(values.rows[token])
                && row < values.capacity
            {
                expected[row * width..][..width].copy_from_slice(new);
            }
        }
        close(&widen(cache), &expected, |at, _| case.bound(part, &expected, at))
            .map_err(|why| format!("cache of part {index}: {why}"))?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference() {
    on_gpu(|stream| {
        let tried = |case: Case| check_case(stream, &case).map_err(TestCaseError::fail);
        runner().run(&any_case(), tried).unwrap();
    });
}

/// Qwen3's attention with a norm of each head, GLM's partial rotation, DeepSeek's latent: keys of one head whose first elements
/// are normed and whose last are rotated.
fn named_models() -> [Case; 3] {
    let rope = |rotary, layout| Rope::new(rotary, 1e6, layout, RopeScaling::None).unwrap();
    let part = |num_heads, head_dim, first| Part { num_heads, head_dim, first, norm: None };
    let normed = |norm, part| Part { norm: Some(norm), ..part };
    let case = |rope, q, k, v, fused| Case {
        rope,
        num_tokens: 33,
        q,
        k,
        v,
        fused,
        pad: 0,
        clip: None,
        most_position: 40_000,
        // Of which a single token is cached.
        seed: 2,
    };
    [
        case(
            rope(128, RopeLayout::Half),
            normed(128, part(32, 128, 0)),
            normed(128, part(4, 128, 0)),
            part(4, 128, 0),
            true,
        ),
        case(rope(64, RopeLayout::Half), part(96, 128, 0), part(8, 128, 0), part(8, 128, 0), true),
        case(
            rope(64, RopeLayout::Interleaved),
            part(16, 192, 128),
            normed(512, part(1, 576, 512)),
            part(0, 0, 0),
            false,
        ),
    ]
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn shapes_of_named_models() {
    on_gpu(|stream| {
        for case in named_models() {
            // A block for each token, or several for the only one.
            for num_tokens in [case.num_tokens, 1] {
                check_case(stream, &Case { num_tokens, ..case.clone() }).unwrap();
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn norms_have_the_bits_of_a_launch_of_their_own() {
    on_gpu(|stream| {
        let [qwen, glm, _] = named_models();
        let normed = |part: Part| Part { norm: Some(part.head_dim), ..part };
        let glm = Case { q: normed(glm.q), k: normed(glm.k), ..glm };
        for case in [qwen, glm] {
            for (num_tokens, clip) in [(1, None), (7, Some(1.0)), (33, None)] {
                let case = Case { num_tokens, clip, ..case.clone() };
                let values = case.values();
                let mut together = Call::new(stream, &case, &values);
                together.launch(stream, &case, &values);

                let plain = |part: Part| Part { norm: None, ..part };
                let without = Case { q: plain(case.q), k: plain(case.k), ..case.clone() };
                let mut apart = Call::new(stream, &case, &values);
                for (i, part) in [case.q, case.k].into_iter().enumerate() {
                    let (range, weight) = (part.at(values.columns[i]), apart.weights[i].view());
                    rms_norm_heads_into(stream, &mut apart.matrices[0].view_mut(), range, &weight, EPS).unwrap();
                }
                apart.launch(stream, &without, &values);

                let (together, apart) = (together.read(stream), apart.read(stream));
                let queries = |matrix: &[bf16]| -> Vec<u16> {
                    let columns = values.columns[0]..values.columns[0] + case.q.width();
                    matrix.chunks_exact(values.widths[0]).flat_map(|row| bits(&row[columns.clone()])).collect()
                };
                assert!(queries(&together[0]) == queries(&apart[0]), "{num_tokens} tokens' queries");
                let same = together[1..].iter().zip(&apart[1..]).all(|(a, b)| bits(a) == bits(b));
                assert!(same, "{num_tokens} tokens' caches");
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_in_a_graph_and_replayed_at_other_positions() {
    on_gpu(|stream| {
        for case in named_models() {
            let values = case.values();
            let mut call = Call::new(stream, &case, &values);
            let graph = capture(stream, || call.launch(stream, &case, &values));
            let later: Vec<i32> = values.positions.iter().map(|position| position + 1).collect();
            for positions in [&values.positions, &later] {
                let values = Values { positions: positions.clone(), ..case.values() };
                call.positions.fill(stream, positions);
                call.matrices[0].fill(stream, &values.matrices[0]);
                graph.launch().unwrap();
                let mut eager = Call::new(stream, &case, &values);
                eager.launch(stream, &case, &values);
                let (replayed, eager) = (call.read(stream), eager.read(stream));
                assert!(replayed.iter().zip(&eager).all(|(a, b)| bits(a) == bits(b)));
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_nan_stays_with_its_pair_or_its_normed_head() {
    on_gpu(|stream| {
        let [normed, ..] = named_models();
        let plain = Case { q: Part { norm: None, ..normed.q }, ..normed.clone() };
        for case in [normed, plain] {
            let mut values = case.values();
            let clean = {
                let mut call = Call::new(stream, &case, &values);
                call.launch(stream, &case, &values);
                bits(&call.read(stream)[0])
            };
            let (token, head) = (17, 5);
            let start = token * values.widths[0] + values.columns[0] + head * 128;
            values.matrices[0][start + 3] = bf16::NAN;
            let mut call = Call::new(stream, &case, &values);
            call.launch(stream, &case, &values);
            let dirty = call.read(stream).swap_remove(0);
            let reached = |at: usize| match case.q.norm {
                Some(_) => (start..start + 128).contains(&at),
                None => at == start + 3 || at == start + 67,
            };
            for at in 0..clean.len() {
                assert!(if reached(at) { dirty[at].is_nan() } else { dirty[at].to_bits() == clean[at] });
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let rope = Rope::new(16, 1e4, RopeLayout::Half, RopeScaling::None).unwrap();
        let table = RopeTable::new(stream, &rope).unwrap();
        let positions = stream.zeros::<i32>([3]).unwrap();
        let refused = |q: HeadRange, q_first: usize, norm: Option<(usize, f32)>, clip, k: Option<HeadRange>| {
            let mut queries = stream.zeros::<bf16>([3, q.width().max(64)]).unwrap();
            let rows = stream.zeros::<i32>([3]).unwrap();
            let mut k_cache = stream.zeros::<bf16>([9, 1, 16]).unwrap();
            let mut v_cache = stream.zeros::<bf16>([9, 0, 0]).unwrap();
            let cache = k.map(|k| RopeCache {
                keys: None,
                k,
                k_first: 0,
                k_norm: None,
                values: None,
                v: HeadRange { column: 0, num_heads: 0, head_dim: 0 },
                rows: rows.view(),
                k_cache: k_cache.view_mut(),
                v_cache: v_cache.view_mut(),
            });
            let (positions, queries) = (positions.view(), queries.view_mut());
            let weight = stream.zeros::<f32>([norm.map_or(1, |(width, _)| width)]).unwrap();
            let q_norm = norm.map(|(_, eps)| HeadNorm { weight: weight.view(), eps });
            let mut buffers = RopeBuffers { positions, queries, q, q_first, q_norm, cache, clip };
            rope_into(stream, &table, &mut buffers).unwrap_err().to_string()
        };
        let heads = |column, num_heads, head_dim| HeadRange { column, num_heads, head_dim };
        let setting = "rope: the kernel was not launched: a size or setting is out of range or contradicts another";
        assert_eq!(refused(heads(0, 2, 16), 1, None, None, None), setting);
        assert_eq!(refused(heads(0, 2, 16), 0, None, Some(0.0), None), setting);
        assert_eq!(refused(heads(0, 2, 16), 0, Some((16, -1.0)), None, None), setting);
        assert_eq!(refused(heads(0, 2, 16), 0, Some((16, f32::NAN)), None, None), setting);
        assert_eq!(refused(heads(0, 1, 520), 0, Some((513, EPS)), None, None), setting);
        for width in [0, 17] {
            let error = refused(heads(0, 2, 16), 0, Some((width, EPS)), None, None);
            assert_eq!(error, format!("rope: q_norm must be 1 to 16 long, got {width}"));
        }
        let error = refused(heads(48, 2, 16), 0, None, None, None);
        assert!(error.starts_with("rope: queries must be at least 80 columns wide"), "{error}");
        let error = refused(heads(0, 2, 16), 0, None, None, Some(heads(24, 1, 16)));
        assert!(error.starts_with("rope: columns of queries, keys and values must be apart"), "{error}");
        let error = refused(heads(0, 2, 16), 0, None, None, Some(heads(32, 2, 16)));
        assert_eq!(error, "rope: k_cache must be [9, 2, 16], got [9, 1, 16]");
    });
}
