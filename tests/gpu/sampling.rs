//! argmax and sample.

use anabranch::{
    Sampling,
    cuda::{Float, SampleInput, SampleRow, Stream, argmax, argmax_into, argmax_workspace, sample, sample_into},
    reference,
};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use crate::{
    numbers::capture,
    support::{Guarded, Noise, on_gpu, runner},
};

/// What the logits look like.
#[derive(Debug, Clone, Copy)]
enum Flavour {
    Normal,
    /// One token is nearly certain.
    Peaked,
    /// Quarters: nearly everything ties.
    Ties,
    Equal,
    /// Most cannot be drawn.
    Masked,
    /// NaN, infinities and signed zeros.
    Ugly,
}

#[derive(Debug, Clone)]
struct Case {
    rows: usize,
    vocab: usize,
    flavour: Flavour,
    seed: u64,
    offset: usize,
}

impl Case {
    /// Rounded to bf16, so that both types hold the same.
    fn logits(&self) -> Vec<f32> {
        let mut noise = Noise(self.seed);
        let value = |noise: &mut Noise| match self.flavour {
            Flavour::Normal => 3.0 * noise.normal(),
            Flavour::Peaked => noise.normal() + if noise.bits().is_multiple_of(97) { 30.0 } else { 0.0 },
            Flavour::Ties => (noise.normal() * 4.0).round() / 4.0,
            Flavour::Equal => -0.5,
            Flavour::Masked if !noise.bits().is_multiple_of(50) => f32::NEG_INFINITY,
            Flavour::Masked => noise.normal(),
            Flavour::Ugly => match noise.bits() % 3000 {
                0 => f32::NAN,
                1 => f32::INFINITY,
                2..=500 => -0.0,
                501..=1000 => 0.0,
                1001..=1500 => f32::NEG_INFINITY,
                _ => -noise.uniform(),
            },
        };
        (0..self.rows * self.vocab).map(|_| bf16::from_f32(value(&mut noise)).to_f32()).collect()
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let vocab = prop_oneof![
        2 => 1..3000_usize,
        1 => prop::sample::select(vec![1, 31, 32, 33, 8191, 8192, 8193, 16_384, 20_000, 32_000]),
    ];
    let flavour = prop::sample::select(vec![
        Flavour::Normal,
        Flavour::Peaked,
        Flavour::Ties,
        Flavour::Equal,
        Flavour::Masked,
        Flavour::Ugly,
    ]);
    (0..12_usize, vocab, flavour, any::<u64>(), 0..3_usize).prop_map(|(rows, vocab, flavour, seed, offset)| Case {
        rows,
        vocab,
        flavour,
        seed,
        offset,
    })
}

/// The reference's choice; -1 where it refuses.
fn chosen(sampling: &Sampling, logits: &[f32], seen: &[u32], u: f64) -> i32 {
    reference::sample(sampling, logits, seen, u).map_or(-1, |id| id as i32)
}

fn greedy<L: Float + PartialEq>(stream: &Stream, case: &Case, logits: &[L]) -> Vec<i32> {
    let logits = Guarded::holding(stream, [case.rows, case.vocab], logits, L::default(), case.offset);
    let bytes = argmax_workspace(case.rows, case.vocab).unwrap();
    let mut workspace = Guarded::new(stream, [bytes], 0xa5, 0);
    let mut ids = Guarded::new(stream, [case.rows], 77, 1);
    argmax_into(stream, &logits.view(), &mut workspace.view_mut(), &mut ids.view_mut()).unwrap();
    workspace.read(stream);
    ids.read(stream)
}

fn check_argmax(stream: &Stream, case: &Case) -> Result<(), String> {
    let logits = case.logits();
    let narrow: Vec<bf16> = logits.iter().map(|logit| bf16::from_f32(*logit)).collect();
    let expected: Vec<i32> =
        logits.chunks_exact(case.vocab).map(|row| chosen(&Sampling::greedy(), row, &[], 0.0)).collect();
    let (wide, narrow) = (greedy(stream, case, &logits), greedy(stream, case, &narrow));
    if wide == expected && narrow == expected {
        return Ok(());
    }
    Err(format!("{wide:?} of float32, {narrow:?} of bf16, not {expected:?}"))
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn argmax_agrees_with_the_reference() {
    on_gpu(|stream| {
        let tried = |case: Case| check_argmax(stream, &case).map_err(TestCaseError::fail);
        runner().run(&any_case(), tried).unwrap();
    });
}

fn any_sampling() -> impl Strategy<Value = Sampling> {
    let temperature = prop::sample::select(vec![0.0_f32, 0.01, 0.7, 1.0, 3.0]);
    let top_k = prop_oneof![Just(None), Just(Some(1)), (1..100_usize).prop_map(Some), Just(Some(50_000))];
    let top_p = prop::sample::select(vec![1.0_f32, 1.0, 0.95, 0.5, 1e-6]);
    let min_p = prop::sample::select(vec![0.0_f32, 0.0, 0.05, 0.9]);
    let penalty = prop::sample::select(vec![1.0_f32, 1.0, 1.25, 0.5]);
    (temperature, top_k, top_p, min_p, penalty)
        .prop_map(|(temperature, top_k, top_p, min_p, penalty)| build(temperature, top_k, top_p, min_p, penalty))
}

/// Settings of rows side by side; more rows than these take them again from the first.
fn any_samplings() -> impl Strategy<Value = Vec<Sampling>> {
    prop::collection::vec(any_sampling(), 1..5)
}

fn build(temperature: f32, top_k: Option<usize>, top_p: f32, min_p: f32, penalty: f32) -> Sampling {
    let mut builder = Sampling::builder().temperature(temperature).top_p(top_p).min_p(min_p);
    builder = builder.repetition_penalty(penalty);
    if let Some(top_k) = top_k {
        builder = builder.top_k(top_k);
    }
    builder.build().unwrap()
}

/// Whether the reference could have drawn `id`, had its borders been a little elsewhere: float32 moves them that far.
fn could_be(sampling: &Sampling, logits: &[f32], seen: &[u32], u: f64, id: i32) -> bool {
    // A rounded logit is felt the more, the lower the temperature.
    let near = f64::from(1e-6 / sampling.temperature()).max(1e-5);
    let shifts = [0.0, -near, near];
    // Probable tokens lie far apart, improbable ones close together.
    let draws = [0.0, -1e-8, 1e-8, -1e-7, 1e-7, -1e-6, 1e-6, -near, near];
    shifts.iter().any(|by_p| {
        shifts.iter().any(|by_min| {
            // A limit that is none has no border.
            let shifted = |value: f32, none: f32, by: f64, most: f64| match value {
                value if value == none => value,
                value => (f64::from(value) * (1.0 + by)).min(most) as f32,
            };
            let top_p = shifted(sampling.top_p(), 1.0, *by_p, 1.0);
            let min_p = shifted(sampling.min_p(), 0.0, *by_min, 0.999_999);
            let moved = build(sampling.temperature(), sampling.top_k(), top_p, min_p, sampling.repetition_penalty());
            draws.iter().any(|by| chosen(&moved, logits, seen, (u + by).clamp(0.0, 0.999_999_99)) == id)
        })
    })
}

struct Drawn {
    ids: Vec<i32>,
    seen: Vec<u32>,
}

fn draw<L: Float + PartialEq>(stream: &Stream, case: &Case, rows: &[SampleRow], logits: &[L], seen: &[u32]) -> Drawn {
    let logits = Guarded::holding(stream, [case.rows, case.vocab], logits, L::default(), case.offset);
    let rows = stream.upload([case.rows], rows).unwrap();
    let mut seen = Guarded::holding(stream, [case.rows, case.vocab.div_ceil(32)], seen, 0xdead, 1);
    let mut ids = Guarded::new(stream, [case.rows], 77, 1);
    let mut input = SampleInput { logits: logits.view(), rows: rows.view(), seen: Some(seen.view_mut()) };
    sample_into(stream, &mut input, &mut ids.view_mut()).unwrap();
    Drawn { ids: ids.read(stream), seen: seen.read(stream) }
}

fn check_sample(stream: &Stream, case: &Case, samplings: &[Sampling]) -> Result<(), String> {
    let mut noise = Noise(case.seed ^ 0x5a);
    let (logits, words) = (case.logits(), case.vocab.div_ceil(32));
    let samplings: Vec<&Sampling> = samplings.iter().cycle().take(case.rows).collect();
    let u: Vec<f64> = (0..case.rows).map(|_| (noise.bits() >> 11) as f64 / (1_u64 << 53) as f64).collect();
    let rows: Vec<SampleRow> =
        samplings.iter().zip(&u).map(|(sampling, u)| SampleRow::new(sampling, *u).unwrap()).collect();
    let mut seen: Vec<u32> = (0..case.rows * words).map(|_| (noise.bits() & noise.bits()) as u32).collect();
    // No bits past the vocabulary.
    for row in seen.chunks_exact_mut(words) {
        row[words - 1] &= u32::MAX >> ((32 - case.vocab % 32) % 32);
    }
    let drawn = draw(stream, case, &rows, &logits, &seen);
    if drawn.ids != draw(stream, case, &rows, &logits, &seen).ids {
        return Err("the same call twice drew different tokens".to_owned());
    }
    let narrow: Vec<bf16> = logits.iter().map(|logit| bf16::from_f32(*logit)).collect();
    if drawn.ids != draw(stream, case, &rows, &narrow, &seen).ids {
        return Err("bf16 logits of the same values drew different tokens".to_owned());
    }
    for (row, id) in drawn.ids.iter().enumerate() {
        let logits = &logits[row * case.vocab..][..case.vocab];
        let before = &seen[row * words..][..words];
        let listed: Vec<u32> =
            (0..case.vocab as u32).filter(|id| before[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        let (sampling, u) = (samplings[row], u[row]);
        if *id != chosen(sampling, logits, &listed, u) && !could_be(sampling, logits, &listed, u, *id) {
            let expected = chosen(sampling, logits, &listed, u);
            return Err(format!("row {row}: {id} is drawn where {expected} belongs, at {u} of {sampling:?}"));
        }
        let mut after = before.to_vec();
        if let Ok(id) = usize::try_from(*id) {
            after[id / 32] |= 1 << (id % 32);
        }
        if drawn.seen[row * words..][..words] != after {
            return Err(format!("row {row}: other tokens than {id} were marked as seen"));
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn sample_agrees_with_the_reference() {
    on_gpu(|stream| {
        let tried = |(case, samplings): (Case, Vec<Sampling>)| {
            check_sample(stream, &case, &samplings).map_err(TestCaseError::fail)
        };
        runner().run(&(any_case(), any_samplings()), tried).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_vocabulary_of_published_size() {
    on_gpu(|stream| {
        let samplings = [build(0.8, Some(40), 0.9, 0.02, 1.1), build(1.0, None, 0.95, 0.0, 1.0), Sampling::greedy()];
        for flavour in [Flavour::Normal, Flavour::Equal, Flavour::Ties] {
            let case = Case { rows: 3, vocab: 151_936, flavour, seed: 8, offset: 0 };
            check_argmax(stream, &case).unwrap();
            check_sample(stream, &case, &samplings).unwrap();
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn are_captured_in_a_graph_and_replayed_with_other_logits_and_settings() {
    on_gpu(|stream| {
        let case = |seed| Case { rows: 2, vocab: 20_000, flavour: Flavour::Normal, seed, offset: 0 };
        let mixtures = [
            [(build(0.7, None, 0.9, 0.0, 1.0), 0.3), (Sampling::greedy(), 0.0)],
            [(build(1.0, Some(30), 1.0, 0.0, 1.0), 0.9), (build(2.0, None, 1.0, 0.01, 1.0), 0.99)],
        ];
        let mixtures = mixtures.map(|rows| rows.map(|(sampling, u)| SampleRow::new(&sampling, u).unwrap()));
        let mut logits = Guarded::holding(stream, [2, 20_000], &case(1).logits(), 0.0, 0);
        let mut rows = stream.upload([2], &mixtures[0]).unwrap();
        let mut workspace = Guarded::new(stream, [argmax_workspace(2, 20_000).unwrap()], 0, 0);
        let (mut best, mut drawn) = (Guarded::new(stream, [2], 77, 0), Guarded::new(stream, [2], 77, 0));
        let graph = capture(stream, || {
            argmax_into(stream, &logits.view(), &mut workspace.view_mut(), &mut best.view_mut()).unwrap();
            let mut input = SampleInput { logits: logits.view(), rows: rows.view(), seen: None };
            sample_into(stream, &mut input, &mut drawn.view_mut()).unwrap();
        });
        for (seed, mixture) in [(1, 0), (2, 0), (2, 1), (1, 0)] {
            let (case, mixture) = (case(seed), &mixtures[mixture]);
            let values = case.logits();
            logits.fill(stream, &values);
            stream.upload_into(mixture, &mut rows.view_mut()).unwrap();
            graph.launch().unwrap();
            assert_eq!(best.read(stream), greedy(stream, &case, &values));
            let seen = vec![0; 2 * 625];
            assert_eq!(drawn.read(stream), draw(stream, &case, mixture, &values, &seen).ids);
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let none = stream.zeros::<f32>([2, 0]).unwrap();
        assert_eq!(
            argmax(stream, &none.view()).unwrap_err().to_string(),
            "argmax: the kernel was not launched: a size or setting is out of range or contradicts another"
        );
        let logits = stream.zeros::<f32>([2, 40]).unwrap();
        let mut ids = stream.zeros::<i32>([2]).unwrap();
        let mut refused = |count: usize, words: usize| {
            let rows = stream.zeros::<SampleRow>([count]).unwrap();
            let mut seen = stream.zeros::<u32>([2, words]).unwrap();
            let mut input = SampleInput { logits: logits.view(), rows: rows.view(), seen: Some(seen.view_mut()) };
            sample_into(stream, &mut input, &mut ids.view_mut()).unwrap_err().to_string()
        };
        assert_eq!(refused(2, 1), "sample: seen must be [2, 2], got [2, 1]");
        assert_eq!(refused(3, 2), "sample: rows must be [2], got [3]");
        let (long, rows) = (stream.zeros::<f32>([1, (1 << 22) + 1]).unwrap(), stream.zeros::<SampleRow>([1]).unwrap());
        let mut input = SampleInput { logits: long.view(), rows: rows.view(), seen: None };
        assert_eq!(
            sample(stream, &mut input).unwrap_err().to_string(),
            "sample: the kernel was not launched: a size or setting is out of range or contradicts another"
        );
        for u in [-0.1, 1.0, f64::NAN] {
            let text = SampleRow::new(&Sampling::greedy(), u).unwrap_err().to_string();
            assert!(text.starts_with("sample: u must be at least 0 and below 1, got "), "{text}");
        }
    });
}

/// Settings lie where only the kernel sees them: a row that has none, and one with a penalty where nothing tells what was seen, are
/// marked, and the others are drawn as ever.
#[test]
#[ignore = "needs a CUDA GPU"]
fn rows_that_cannot_be_drawn_from_are_marked() {
    on_gpu(|stream| {
        let case = Case { rows: 4, vocab: 3000, flavour: Flavour::Normal, seed: 4, offset: 0 };
        let values = case.logits();
        let logits = stream.upload([4, 3000], &values).unwrap();
        let mut rows = stream.zeros::<SampleRow>([4]).unwrap();
        let plain = build(0.9, Some(20), 0.8, 0.0, 1.0);
        let given = [(plain, 0.4), (build(0.9, None, 1.0, 0.0, 1.5), 0.4), (Sampling::greedy(), 0.0)];
        let given = given.map(|(sampling, u)| SampleRow::new(&sampling, u).unwrap());
        // The last one is left at zero.
        stream.upload_into(&given, &mut rows.part_mut(0, [3]).unwrap()).unwrap();
        let mut input = SampleInput { logits: logits.view(), rows: rows.view(), seen: None };
        let ids = stream.download(&sample(stream, &mut input).unwrap().view()).unwrap();
        let row = |row: usize| &values[row * 3000..][..3000];
        let expected = [chosen(&plain, row(0), &[], 0.4), -1, chosen(&Sampling::greedy(), row(2), &[], 0.0), -1];
        assert_eq!(ids, expected);
    });
}
