//! attention: prefill and decoding over a cache, for batches of any lengths.

mod cases;

use anabranch::{
    Error,
    cuda::{
        AttentionBatch, AttentionInput, Stream, attention, attention_into, attention_workspace,
        cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
    },
    reference::AttentionShape,
};
use cases::{Case, Data, any_case, floats};
use half::bf16;
use proptest::test_runner::TestCaseError;

use crate::support::{Guarded, on_gpu, runner};

/// What the result starts as.
const POISON: bf16 = bf16::from_f32_const(-77.0);

/// What a call reads, on the device and guarded.
struct Inputs {
    shape: AttentionShape,
    bounds: [usize; 2],
    q: Guarded<bf16>,
    keys: Guarded<bf16>,
    values: Option<Guarded<bf16>>,
    q_offsets: Guarded<u32>,
    kv_lengths: Guarded<u32>,
    block_table: Guarded<u32>,
    table_starts: Guarded<u32>,
    block_size: usize,
}

impl Inputs {
    fn new(stream: &Stream, case: &Case, data: &Data) -> Self {
        let numbers = |values: &[u32]| Guarded::holding(stream, [values.len()], values, 9, 0);
        let matrix = |rows, width, values: &[bf16]| Guarded::holding(stream, [rows, width], values, POISON, 0);
        let shape = case.shape;
        Self {
            shape,
            bounds: case.bounds(),
            q: matrix(case.tokens(), shape.num_heads * shape.key_dim, &data.q),
            keys: matrix(data.rows, data.strides[0], &data.keys),
            values: (!case.latent).then(|| matrix(data.rows, data.strides[1], &data.values)),
            q_offsets: numbers(&data.q_offsets),
            kv_lengths: numbers(&data.kv_lengths),
            block_table: numbers(&data.block_table),
            table_starts: numbers(&data.table_starts),
            block_size: case.block_size,
        }
    }

    fn views(&self) -> AttentionInput<'_> {
        AttentionInput {
            q: self.q.view(),
            keys: self.keys.view(),
            values: self.values.as_ref().map(Guarded::view),
            batch: AttentionBatch {
                q_offsets: self.q_offsets.view(),
                kv_lengths: self.kv_lengths.view(),
                block_table: self.block_table.view(),
                table_starts: self.table_starts.view(),
                block_size: self.block_size,
                max_q_len: self.bounds[0],
                max_kv_len: self.bounds[1],
            },
        }
    }
}

/// One call, what it writes poisoned and guarded.
struct Call {
    inputs: Inputs,
    workspace: Guarded<u8>,
    out: Guarded<bf16>,
}

impl Call {
    fn new(stream: &Stream, case: &Case, data: &Data) -> Self {
        let (inputs, shape) = (Inputs::new(stream, case, data), case.shape);
        let bytes = attention_workspace(stream, &shape, &inputs.views()).unwrap();
        Self {
            inputs,
            workspace: Guarded::new(stream, [bytes], 0xa5, 0),
            out: Guarded::new(stream, [case.tokens(), shape.num_heads * shape.value_dim], POISON, 0),
        }
    }

    fn launch(&mut self, stream: &Stream) -> Result<(), Error> {
        let Self { inputs, workspace, out } = self;
        attention_into(stream, &inputs.shape, &inputs.views(), &mut workspace.view_mut(), &mut out.view_mut())
    }

    /// The result, once nothing outside of it is found changed.
    fn read(&self, stream: &Stream) -> Vec<bf16> {
        self.workspace.read(stream);
        self.out.read(stream)
    }
}

fn attend(stream: &Stream, case: &Case, data: &Data) -> Vec<bf16> {
    let mut call = Call::new(stream, case, data);
    call.launch(stream).unwrap();
    call.read(stream)
}

fn bits(values: &[bf16]) -> Vec<u16> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// ||got - expected|| and ||expected||.
fn norms(got: &[f32], expected: &[f32]) -> (f64, f64) {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    (squares(&mut got.iter().zip(expected).map(|(a, b)| a - b)), squares(&mut expected.iter().copied()))
}

/// Within 1e-2 of everything, and 3e-2 of every head of every token.
fn compare(shape: &AttentionShape, got: &[bf16], expected: &[f32]) -> Result<(), String> {
    let got = floats(got);
    assert_eq!(got.len(), expected.len());
    for (row, (got, expected)) in
        got.chunks_exact(shape.value_dim).zip(expected.chunks_exact(shape.value_dim)).enumerate()
    {
        let (error, norm) = norms(got, expected);
        if error.is_nan() || error > 3e-2 * norm {
            let (token, head) = (row / shape.num_heads, row % shape.num_heads);
            return Err(format!("token {token}, head {head}: error {error} of {norm}\n{got:?}\nnot\n{expected:?}"));
        }
    }
    let (error, norm) = norms(&got, expected);
    if error <= 1e-2 * norm { Ok(()) } else { Err(format!("error {error} of {norm}")) }
}

fn check_case(stream: &Stream, case: &Case) -> Result<(), String> {
    let data = case.data();
    let out = attend(stream, case, &data);
    if bits(&out) != bits(&attend(stream, case, &data)) {
        return Err("the same call twice gave different bits".to_owned());
    }
    compare(&case.shape, &out, &case.expected(&data))
}

fn heads(num_heads: usize, num_kv_heads: usize, key_dim: usize, value_dim: usize) -> AttentionShape {
    AttentionShape { num_heads, num_kv_heads, key_dim, value_dim, scale: (key_dim as f32).powf(-0.5) }
}

fn plain(shape: AttentionShape, latent: bool, lengths: &[(usize, usize)]) -> Case {
    Case { shape, latent, lengths: lengths.to_vec(), slack: [0, 0], block_size: 64, padding: 0, gain: 1.0, seed: 11 }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference_over_all_shapes() {
    on_gpu(|stream| {
        let tried = |case: Case| check_case(stream, &case).map_err(TestCaseError::fail);
        runner().run(&any_case(), tried).unwrap();
    });
}

/// Every kernel once, at lengths that no case of the property reaches.
#[test]
#[ignore = "needs a CUDA GPU"]
fn long_contexts() {
    on_gpu(|stream| {
        for (shape, latent, lengths) in [
            (heads(8, 2, 64, 64), false, &[(1, 32_768), (1, 1), (3, 20_000)][..]),
            (heads(8, 1, 128, 128), false, &[(1, 32_768)]),
            (heads(2, 2, 192, 128), false, &[(2, 32_768)]),
            (heads(2, 1, 128, 128), false, &[(150, 32_768), (1, 17)]),
            (heads(16, 1, 576, 512), true, &[(1, 32_768), (1, 5)]),
            (heads(128, 1, 576, 512), true, &[(1, 32_768)]),
        ] {
            check_case(stream, &plain(shape, latent, lengths)).unwrap_or_else(|error| panic!("{shape:?}: {error}"));
        }
    });
}

/// Prompts of more tiles than there are blocks, in batches with sequences of other kinds; on Hopper these are its own kernel's.
#[test]
#[ignore = "needs a CUDA GPU"]
fn prompts_of_many_tiles() {
    on_gpu(|stream| {
        // More sequences than a warp looks at at once, some without tokens.
        let many: Vec<_> = (0..75).map(|at| [(0, 7), (1, 90 + at), (140 + at, 200 + 2 * at)][at % 3]).collect();
        for (shape, block_size, lengths) in [
            (heads(32, 4, 128, 128), 64, &[(700, 700), (0, 40), (130, 1111), (1, 300)][..]),
            (heads(4, 4, 128, 128), 128, &[(128, 128), (129, 1025), (1000, 1000)]),
            (heads(8, 1, 128, 128), 1024, &[(257, 2000), (640, 640)]),
            (heads(32, 4, 64, 64), 64, &[(900, 901), (192, 192), (193, 1500)]),
            (heads(4, 1, 64, 64), 1024, &[(1500, 1500), (191, 2000), (5, 64)]),
            (heads(16, 16, 192, 128), 64, &[(515, 900), (256, 256), (1, 1)]),
            (heads(8, 2, 192, 128), 128, &[(130, 1290), (127, 127)]),
            (heads(6, 2, 96, 80), 64, &[(300, 333)]),
            (heads(4, 1, 128, 128), 64, &many),
            (heads(4, 1, 64, 64), 64, &many),
        ] {
            for padding in [0, 8] {
                let case = Case { block_size, padding, ..plain(shape, false, lengths) };
                check_case(stream, &case).unwrap_or_else(|error| panic!("{shape:?}, padding {padding}: {error}"));
            }
        }
    });
}

/// As a cache that was made for long texts holds short ones: most parts of the keys are empty.
#[test]
#[ignore = "needs a CUDA GPU"]
fn bounds_far_above_the_lengths() {
    on_gpu(|stream| {
        for (shape, latent) in [(heads(32, 4, 128, 128), false), (heads(16, 1, 576, 512), true)] {
            let case = Case { slack: [0, 32_000], ..plain(shape, latent, &[(1, 3), (0, 9), (1, 700), (1, 64)]) };
            check_case(stream, &case).unwrap();
        }
    });
}

/// Where a sequence's blocks lie, and how large they are, changes no bit; nor does sharing them.
#[test]
#[ignore = "needs a CUDA GPU"]
fn tables_decide_where_keys_are_read_and_nothing_else() {
    on_gpu(|stream| {
        for (shape, latent, tokens) in [
            (heads(8, 2, 128, 128), false, 1),
            (heads(8, 2, 128, 128), false, 150),
            (heads(8, 2, 64, 64), false, 200),
            (heads(4, 4, 192, 128), false, 150),
            (heads(16, 1, 576, 512), true, 1),
            (heads(64, 1, 576, 512), true, 9),
        ] {
            let small = plain(shape, latent, &[(tokens, 1000)]);
            let data = small.data();
            let expected = bits(&attend(stream, &small, &data));

            // One block that holds everything.
            let large = Case { block_size: 1024, ..small.clone() };
            let table = &data.block_table[data.table_starts[0] as usize..][..1000_usize.div_ceil(64)];
            let whole = |cache: &[bf16], stride: usize| {
                let mut rows = Vec::new();
                table
                    .iter()
                    .for_each(|block| rows.extend_from_slice(&cache[*block as usize * 64 * stride..][..64 * stride]));
                rows
            };
            let [key_stride, value_stride] = data.strides;
            let values = if latent { Vec::new() } else { whole(&data.values, value_stride) };
            let keys = whole(&data.keys, key_stride);
            let moved = Data { keys, values, rows: 1024, block_table: vec![0], table_starts: vec![0], ..small.data() };
            assert_eq!(bits(&attend(stream, &large, &moved)), expected, "{shape:?}");

            // Two sequences over the same blocks.
            let twice = plain(shape, latent, &[(tokens, 1000), (tokens, 1000)]);
            let shared = Data {
                q: data.q.repeat(2),
                q_offsets: vec![0, tokens as u32, 2 * tokens as u32],
                kv_lengths: vec![1000; 2],
                table_starts: vec![data.table_starts[0]; 2],
                ..small.data()
            };
            let both = bits(&attend(stream, &twice, &shared));
            let (first, second) = both.split_at(both.len() / 2);
            assert_eq!(first, second, "{shape:?}");
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn no_tokens_write_nothing() {
    on_gpu(|stream| {
        assert_eq!(check_case(stream, &plain(heads(4, 2, 64, 64), false, &[])), Ok(()));
        assert_eq!(check_case(stream, &plain(heads(4, 2, 64, 64), false, &[(0, 5), (0, 0)])), Ok(()));
    });
}

/// Also in the tiles of keys that it shares with a sequence's end.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_nan_stays_in_its_sequence() {
    on_gpu(|stream| {
        for (shape, latent, lengths) in [
            (heads(4, 2, 128, 128), false, &[(90, 100), (70, 70), (1, 33)][..]),
            (heads(4, 2, 128, 128), false, &[(150, 200), (140, 141), (1, 33)]),
            (heads(4, 2, 64, 64), false, &[(150, 200), (200, 333), (1, 33)]),
            (heads(4, 2, 128, 128), false, &[(1, 100), (1, 70), (2, 33)]),
            (heads(16, 1, 576, 512), true, &[(1, 100), (1, 70), (3, 33)]),
        ] {
            let case = plain(shape, latent, lengths);
            let clean = case.data();
            let mut dirty = case.data();
            let first = dirty.block_table[dirty.table_starts[1] as usize] as usize;
            dirty.keys[first * case.block_size * dirty.strides[0]] = bf16::NAN;
            let width = shape.num_heads * shape.value_dim;
            let [clean, dirty] = [&clean, &dirty].map(|data| attend(stream, &case, data));
            let middle = lengths[0].0 * width..(lengths[0].0 + lengths[1].0) * width;
            // The other key head does not see it.
            let per_kv_head = width / shape.num_kv_heads;
            for (at, (clean, dirty)) in clean.iter().zip(&dirty).enumerate() {
                if middle.contains(&at) && at % width < per_kv_head {
                    assert!(dirty.is_nan(), "{shape:?}: {at}");
                } else {
                    assert_eq!(clean.to_bits(), dirty.to_bits(), "{shape:?}: {at}");
                }
            }
        }
    });
}

/// What lies past the last key that a tile of queries sees is not among its values: 384 tokens are whole tiles of any kernel.
#[test]
#[ignore = "needs a CUDA GPU"]
fn a_nan_value_does_not_reach_the_tiles_before_it() {
    on_gpu(|stream| {
        for (key_dim, value_dim) in [(64, 64), (128, 128), (192, 128)] {
            let case = plain(heads(2, 1, key_dim, value_dim), false, &[(600, 650)]);
            let clean = case.data();
            let mut dirty = case.data();
            let position = 440;
            let block = dirty.block_table[dirty.table_starts[0] as usize + position / case.block_size] as usize;
            dirty.values[(block * case.block_size + position % case.block_size) * dirty.strides[1]] = bf16::NAN;
            let [clean, dirty] = [&clean, &dirty].map(|data| attend(stream, &case, data));
            let before = 384 * 2 * value_dim;
            assert_eq!(bits(&clean[..before]), bits(&dirty[..before]), "{key_dim}");
            for (token, heads) in dirty.chunks_exact(2 * value_dim).enumerate().skip(position - 50) {
                assert!(heads[0].is_nan() && heads[value_dim].is_nan(), "{key_dim}: {token}");
                assert!(heads[1].is_finite() && heads[value_dim + 1].is_finite(), "{key_dim}: {token}");
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_token_without_keys_is_nan() {
    on_gpu(|stream| {
        for tokens in [3, 200] {
            let case = plain(heads(2, 1, 64, 64), false, &[(tokens, tokens)]);
            let mut data = case.data();
            data.kv_lengths[0] = tokens as u32 - 2;
            let out = attend(stream, &case, &data);
            let (blind, seeing) = out.split_at(2 * 128);
            assert!(blind.iter().all(|value| value.is_nan()));
            assert!(seeing.iter().all(|value| value.is_finite()));
        }
    });
}

/// Lengths and tables that lie are cut to the buffers: nothing is read or written outside.
#[test]
#[ignore = "needs a CUDA GPU"]
fn numbers_out_of_range_stay_inside() {
    on_gpu(|stream| {
        for lengths in [&[(1, 40), (1, 50)][..], &[(100, 100), (70, 90)], &[(200, 200), (130, 190)]] {
            let case = plain(heads(4, 2, 128, 128), false, lengths);
            let mut data = case.data();
            data.kv_lengths = vec![u32::MAX, 1 << 30];
            data.q_offsets[2] = u32::MAX;
            for start in [u32::MAX, 1] {
                data.table_starts[1] = start;
                data.block_table.fill(u32::MAX);
                attend(stream, &case, &data);
            }
        }
    });
}

/// Anything that waits for the stream or allocates on the side would break the capture.
#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_in_a_graph_and_replayed_with_other_lengths_and_tables() {
    on_gpu(|stream| {
        for (shape, tokens, lengths) in [
            (heads(8, 2, 128, 128), 1, [200, 131]),
            (heads(8, 2, 128, 128), 130, [200, 131]),
            (heads(32, 4, 64, 64), 700, [750, 701]),
        ] {
            let case = |keys: [usize; 2], seed| Case { seed, ..plain(shape, false, &keys.map(|keys| (tokens, keys))) };
            let (short, long) = (case(lengths, 1), case([900, 1300], 2));
            let data = long.data();
            let mut call = Call::new(stream, &long, &data);
            stream.synchronize().unwrap();

            let raw = stream.cudarc();
            raw.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            let launched = call.launch(stream);
            let graph = raw.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
            launched.unwrap();

            graph.launch().unwrap();
            compare(&shape, &call.read(stream), &long.expected(&data)).unwrap();
            // The same cache, of which less is used, and by the other sequence.
            let table_starts: Vec<u32> = data.table_starts.iter().rev().copied().collect();
            let fewer = Data { kv_lengths: lengths.map(|length| length as u32).to_vec(), table_starts, ..long.data() };
            call.inputs.kv_lengths.fill(stream, &fewer.kv_lengths);
            call.inputs.table_starts.fill(stream, &fewer.table_starts);
            graph.launch().unwrap();
            let expected = Case { lengths: short.lengths, ..long }.expected(&fewer);
            compare(&shape, &call.read(stream), &expected).unwrap();
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn allocating_form_agrees() {
    on_gpu(|stream| {
        let case = plain(heads(8, 2, 64, 64), false, &[(1, 500), (1, 20)]);
        let data = case.data();
        let inputs = Inputs::new(stream, &case, &data);
        let out = attention(stream, &case.shape, &inputs.views()).unwrap();
        assert_eq!(bits(&stream.download(&out.view()).unwrap()), bits(&attend(stream, &case, &data)));
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let case = plain(heads(4, 2, 64, 64), false, &[(2, 9)]);
        let inputs = Inputs::new(stream, &case, &case.data());
        let refused = |shape: AttentionShape, input: &AttentionInput<'_>| {
            attention(stream, &shape, input).unwrap_err().to_string()
        };
        let shape = case.shape;
        assert_eq!(
            refused(AttentionShape { num_heads: 3, ..shape }, &inputs.views()),
            "attention: heads must be a multiple of the key heads, got 3 and 2"
        );
        assert_eq!(
            refused(AttentionShape { key_dim: 60, ..shape }, &inputs.views()),
            "attention: elements of a head and of a cache row must be multiples of 8, got 60, 64, 128 and 128"
        );
        assert_eq!(
            refused(AttentionShape { key_dim: 72, ..shape }, &inputs.views()),
            "attention: cache rows must be wide enough for all heads, got 128 and 128 for 2 heads of 72 and 64"
        );
        assert_eq!(
            refused(AttentionShape { scale: 0.0, ..shape }, &inputs.views()),
            "attention: scale must be positive and finite, got 0"
        );
        assert_eq!(
            refused(AttentionShape { key_dim: 32, ..shape }, &inputs.views()),
            "attention: q must be [2, 128], got [2, 256]"
        );
        assert_eq!(
            refused(shape, &AttentionInput { values: None, ..inputs.views() }),
            "attention: key heads must be 1 where there are no values but the keys, got 2"
        );
        let sized = |block_size| {
            let input = inputs.views();
            AttentionInput { batch: AttentionBatch { block_size, ..input.batch }, ..input }
        };
        for wrong in [0, 32, 96] {
            assert_eq!(
                refused(shape, &sized(wrong)),
                format!("attention: block_size must be a power of two, at least 64, got {wrong}")
            );
        }
        assert_eq!(refused(shape, &sized(128)), "attention: cache rows must be whole blocks of 128, got 192");
        let wide = plain(heads(1, 1, 256, 256), false, &[(1, 4)]);
        let keys = stream.zeros::<bf16>([64, 256]).unwrap();
        let q = stream.zeros::<bf16>([2, 256]).unwrap();
        let input = AttentionInput { q: q.view(), keys: keys.view(), values: Some(keys.view()), ..inputs.views() };
        assert_eq!(
            refused(wide.shape, &input),
            "attention: the kernel was not launched: there is no kernel for this data type, shape or architecture"
        );
    });
}
