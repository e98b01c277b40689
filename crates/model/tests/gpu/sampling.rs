//! Tokens drawn on the GPU against what the reference draws from the logits of the same step.

use anabranch::{Sampling, SamplingBuilder, reference::sample};
use anabranch_model::{BLOCK_SIZE, Batch, Config, Cuda, Draw, Forward, Model, Segment, Session};

use crate::support::{folder, golden, load, on_gpu};

/// Sequences side by side, of one block each.
const ROWS: usize = 7;
const ALL: [usize; ROWS] = [0, 1, 2, 3, 4, 5, 6];

/// Rules of a batch, none like another; the last two leave their logits to the host.
fn rules() -> [Sampling; ROWS] {
    let builder = || Sampling::builder().temperature(0.8);
    [
        builder().temperature(0.0),
        builder().temperature(1.0),
        builder().top_k(20),
        builder().temperature(1.4).top_p(0.9).min_p(0.02),
        builder().top_k(40).top_p(0.7),
        builder().temperature(0.0).repetition_penalty(1.3),
        builder().top_k(30).repetition_penalty(1.2),
    ]
    .map(|rule| rule.build().unwrap())
}

/// The same passes through two sessions: one draws, the other shows the logits.
struct Pair<'a> {
    model: &'a Model<Cuda>,
    drawing: Session<'a, Cuda>,
    showing: Session<'a, Cuda>,
    sequences: Vec<Vec<u32>>,
    /// Tokens of each that are in the cache.
    computed: [usize; ROWS],
    random: u64,
    drawn: usize,
    /// Tokens that are the reference's only with borders a little elsewhere.
    near: usize,
}

impl<'a> Pair<'a> {
    fn new(model: &'a Model<Cuda>) -> Self {
        let session = || {
            let mut session = Session::new(model).unwrap();
            session.reset(ROWS).unwrap();
            session
        };
        let vocab = model.config().vocab_size;
        let prompt = |row: usize| (0..3 + 2 * row).map(|at| ((at * 37 + row * 11) % vocab) as u32).collect();
        Self {
            model,
            drawing: session(),
            showing: session(),
            sequences: (0..ROWS).map(prompt).collect(),
            computed: [0; ROWS],
            random: 5,
            drawn: 0,
            near: 0,
        }
    }

    /// In [0, 1), both ends among them.
    fn uniform(&mut self) -> f64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        match (self.random >> 33) % 40 {
            0 => 0.0,
            1 => 1.0 - f64::EPSILON / 2.0,
            _ => (self.random >> 11) as f64 / (1_u64 << 53) as f64,
        }
    }

    /// A pass over what these sequences have, and the next token of each by its rule.
    fn pass(&mut self, rows: &[usize], rule: impl Fn(usize) -> Sampling) {
        let us: Vec<f64> = rows.iter().map(|_| self.uniform()).collect();
        let tables = ALL.map(|row| [(ROWS - 1 - row) as u32]);
        let (mut ids, mut segments, mut draws) = (Vec::new(), Vec::new(), Vec::new());
        for (&row, u) in rows.iter().zip(us) {
            let (seen, position) = (&self.sequences[row], self.computed[row]);
            ids.extend_from_slice(&seen[position..]);
            segments.push(Segment { blocks: &tables[row], position, len: seen.len() - position });
            draws.push(Draw { sampling: rule(row), seen, u });
        }
        let batch = Batch { ids: &ids, segments: &segments };
        let tokens = self.drawing.sample(&batch, &draws).unwrap();
        let logits = self.showing.forward(&batch).unwrap();
        let mut next = Vec::new();
        let vocab = self.model.config().vocab_size;
        for ((token, draw), logits) in tokens.into_iter().zip(&draws).zip(logits.chunks_exact(vocab)) {
            let token = token.unwrap();
            let exact = draw.token(logits).unwrap() == token;
            assert!(exact || could_be(draw, logits, token), "{token} is drawn at {} of {:?}", draw.u, draw.sampling);
            self.drawn += 1;
            self.near += usize::from(!exact);
            next.push(token);
        }
        assert_eq!(next.len(), rows.len());
        for (row, token) in rows.iter().zip(next) {
            self.computed[*row] = self.sequences[*row].len();
            self.sequences[*row].push(token);
        }
    }
}

/// Whether the reference could have drawn it, had its borders been a little elsewhere: the GPU's probabilities are float32.
fn could_be(draw: &Draw<'_>, logits: &[f32], token: u32) -> bool {
    let rule = draw.sampling;
    if rule.is_greedy() || rule.repetition_penalty() != 1.0 {
        return false;
    }
    let moved = |by_p: f32, by_min: f32| -> Sampling {
        let top_k = |builder: SamplingBuilder| rule.top_k().map_or(builder, |top_k| builder.top_k(top_k));
        let builder = Sampling::builder().temperature(rule.temperature()).min_p(rule.min_p() * (1.0 + by_min));
        let top_p = if rule.top_p() < 1.0 { rule.top_p() * (1.0 + by_p) } else { 1.0 };
        top_k(builder.top_p(top_p)).build().unwrap()
    };
    let filters = [-1e-5, 0.0, 1e-5];
    filters.iter().any(|by_p| {
        filters.iter().any(|by_min| {
            [-1e-6, -1e-7, 0.0, 1e-7, 1e-6].iter().any(|by| {
                let u = (draw.u + by).clamp(0.0, 1.0 - f64::EPSILON / 2.0);
                sample(&moved(*by_p, *by_min), logits, &[], u).unwrap() == token
            })
        })
    })
}

/// A mixture of greedy and drawn sequences: a pass over prompts, steps that are launched piece by piece, recorded and repeated, with
/// rules that change places from step to step, all-greedy steps among them, and steps of other sizes in between, so that none is
/// recorded.
fn check(name: &str, model: &Model<Cuda>) {
    let rules = rules();
    let mut repeated = Pair::new(model);
    let mut counts = Vec::new();
    for step in 0..16 {
        repeated.pass(&ALL, |row| rules[(row + step) % ROWS]);
        counts.push(model.backend().usage().allocations);
    }
    assert!(counts[3..].iter().all(|count| *count == counts[3]), "{name}: allocations after each step {counts:?}");
    for _ in 0..4 {
        repeated.pass(&ALL, |_| rules[0]);
    }
    // What was recorded before serves again, and where nothing is drawn on the GPU, logits still come to the host.
    for step in 0..6 {
        repeated.pass(&ALL, |row| rules[(row + 3 * step) % ROWS]);
        repeated.pass(&ALL, |row| rules[if row % 2 == 0 { 5 } else { 0 }]);
    }
    let mut piecewise = Pair::new(model);
    for step in 0..8 {
        piecewise.pass(&ALL, |row| rules[(row + step) % ROWS]);
        piecewise.pass(&ALL[1 + step % 3..], |row| rules[(row + 2 * step) % ROWS]);
        piecewise.pass(&[step % ROWS], |_| rules[step % 5]);
    }
    for pair in [&repeated, &piecewise] {
        assert!(pair.sequences.iter().all(|ids| ids.len() <= BLOCK_SIZE));
        println!("{name}: {} of {} tokens lie at a border of the reference's", pair.near, pair.drawn);
        assert!(pair.near * 50 <= pair.drawn, "{name}");
    }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn mixed_batches_draw_what_the_reference_draws() {
    on_gpu(|gpu| {
        for name in &golden() {
            check(name, &load(name, gpu()));
        }
    });
}

/// A vocabulary of several blocks of the kernel's, and one that is padded, whose logits all come to the host.
#[test]
#[ignore = "needs a CUDA GPU"]
fn vocabularies_of_other_sizes() {
    on_gpu(|gpu| {
        for vocab_size in [20_000, 509] {
            let mut config = Config::from_dir(&folder("qwen3-moe")).unwrap();
            config.vocab_size = vocab_size;
            let model = Model::random(config, 1, gpu(), &mut |_, _| {}).unwrap();
            check(&format!("a vocabulary of {vocab_size}"), &model);
        }
    });
}

/// Rows of one pass in another order: each keeps its rule and its number. Their logits are one and the same, as their sequences are.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_row_is_drawn_by_its_own_numbers() {
    on_gpu(|gpu| {
        let model = load("qwen3-moe", gpu());
        let rules = rules();
        let ids = [3, 1, 4, 1, 5];
        let draws: Vec<Draw<'_>> = rules
            .iter()
            .zip(1..)
            .map(|(rule, row)| Draw { sampling: *rule, seen: &ids, u: 0.13 * f64::from(row) })
            .collect();
        let tokens = |order: &[usize]| -> Vec<u32> {
            let mut session = Session::new(&model).unwrap();
            session.reset(ROWS).unwrap();
            let tables = ALL.map(|row| [row as u32]);
            let segment = |row: &usize| Segment { blocks: &tables[*row], position: 0, len: ids.len() };
            let segments: Vec<Segment<'_>> = order.iter().map(segment).collect();
            let draws: Vec<Draw<'_>> = order.iter().map(|row| draws[*row]).collect();
            let batch = Batch { ids: &ids.repeat(order.len()), segments: &segments };
            session.sample(&batch, &draws).unwrap().into_iter().map(|token| token.unwrap()).collect()
        };
        let together = tokens(&ALL);
        let reversed = tokens(&[6, 5, 4, 3, 2, 1, 0]);
        assert_eq!(together, reversed.into_iter().rev().collect::<Vec<_>>());
        // A number out of range is refused, as on the host.
        let mut session = Session::new(&model).unwrap();
        session.reset(1).unwrap();
        let segments = [Segment { blocks: &[0], position: 0, len: ids.len() }];
        let wrong = [Draw { u: 1.0, ..draws[1] }];
        let error = session.sample(&Batch { ids: &ids, segments: &segments }, &wrong).unwrap_err().to_string();
        assert_eq!(error, "sample: u must be at least 0 and below 1, got 1");
    });
}
