//! `grouped_gemm`: both products of an expert layer, and plain ones.

mod cases;
mod cublaslt;
mod dense;
mod norm_linear;

use anabranch::{
    Error,
    cuda::{
        Epilogue, Gather, GemmOutput, GroupedGemmInput, Stream, Tile,
        cudarc::driver::sys::{CUdevice_attribute, CUgraphInstantiate_flags, CUstreamCaptureMode},
        grouped_gemm, grouped_gemm_into,
    },
    reference::{self, Permutation},
};
use cases::{BF16, Case, F32, Flavour, any_case, close, experts, floats, products};
use half::bf16;
use proptest::test_runner::TestCaseError;

use crate::support::{Guarded, on_gpu, runner};

/// What results are poisoned with.
const POISON: f32 = -77.0;

/// A result's type: bf16 or f32.
trait Output: GemmOutput + PartialEq + Into<f32> {
    fn poison() -> Self;
}

impl Output for bf16 {
    fn poison() -> Self {
        Self::from_f32(POISON)
    }
}

impl Output for f32 {
    fn poison() -> Self {
        POISON
    }
}

/// The tiles that the GPU has the shared memory for.
fn tiles(stream: &Stream) -> Vec<Tile> {
    let attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let kib = stream.device().context().attribute(attribute).unwrap() / 1024;
    let all =
        [(Tile::Rows16, 79), (Tile::Rows32, 69), (Tile::Rows64, 81), (Tile::Rows128, 105), (Tile::Rows128Wide, 201)];
    all.iter().filter(|(_, needed)| *needed <= kib).map(|(tile, _)| *tile).collect()
}

/// Device buffers of one call, poisoned and guarded.
struct Call<O> {
    x: Guarded<bf16>,
    weights: Guarded<bf16>,
    bias: Option<Guarded<f32>>,
    offsets: Guarded<u32>,
    slots: Option<Guarded<u32>>,
    y: Guarded<O>,
    topk: usize,
    epilogue: Epilogue,
}

/// A product's operands: x of T rows where they are gathered, of R rows in permuted order else.
#[derive(Clone, Copy)]
struct Operands<'a> {
    x: &'a [bf16],
    /// d and n.
    sizes: [usize; 2],
    weights: &'a [bf16],
    bias: Option<&'a [f32]>,
    epilogue: Epilogue,
    permutation: &'a Permutation,
    gathered: bool,
}

fn offsets(permutation: &Permutation) -> Vec<u32> {
    permutation.expert_offsets().iter().map(|offset| *offset as u32).collect()
}

/// As long as there may be rows; what no expert has points nowhere.
fn slots(permutation: &Permutation) -> Vec<u32> {
    let mut slots = vec![u32::MAX; permutation.num_tokens() * permutation.topk()];
    slots.iter_mut().zip(permutation.slots()).for_each(|(to, slot)| *to = *slot as u32);
    slots
}

impl<O: Output> Call<O> {
    fn new(stream: &Stream, operands: Operands<'_>) -> Self {
        let Operands { x, sizes: [depth, columns], weights, bias, epilogue, permutation, gathered } = operands;
        let experts = permutation.expert_offsets().len() - 1;
        let rows = permutation.num_tokens() * permutation.topk();
        let poison = bf16::from_f32(3.0e38);
        let weight_shape = [experts, weights.len() / experts / depth, depth];
        Self {
            x: Guarded::holding(stream, [x.len() / depth, depth], x, poison, 0),
            weights: Guarded::holding(stream, weight_shape, weights, poison, 0),
            bias: bias.map(|bias| Guarded::holding(stream, [experts, bias.len() / experts], bias, 3.0e38, 0)),
            offsets: Guarded::holding(stream, [experts + 1], &offsets(permutation), u32::MAX, 0),
            slots: gathered.then(|| Guarded::holding(stream, [rows], &slots(permutation), u32::MAX, 0)),
            y: Guarded::new(stream, [rows, columns], O::poison(), 0),
            topk: permutation.topk(),
            epilogue,
        }
    }

    fn launch(&mut self, stream: &Stream, tile: Tile) -> Result<(), Error> {
        let topk = self.topk;
        let input = GroupedGemmInput {
            x: self.x.view(),
            weights: self.weights.view(),
            bias: self.bias.as_ref().map(Guarded::view),
            expert_offsets: self.offsets.view(),
            gather: self.slots.as_ref().map(|slots| Gather { slots: slots.view(), topk }),
            epilogue: self.epilogue,
            tile,
        };
        grouped_gemm_into(stream, &input, &mut self.y.view_mut())
    }

    /// All rows, once nothing outside of them is found changed.
    fn read(&self, stream: &Stream) -> Vec<O> {
        self.x.read(stream);
        self.offsets.read(stream);
        self.y.read(stream)
    }
}

fn multiply<O: Output>(stream: &Stream, operands: Operands<'_>, tile: Tile) -> Vec<O> {
    let mut call = Call::new(stream, operands);
    call.launch(stream, tile).unwrap();
    call.read(stream)
}

/// The product by this tile, once others give the same bits and rows of no expert are found untouched.
fn checked<O: Output>(stream: &Stream, operands: Operands<'_>, tile: Tile) -> Result<Vec<O>, String> {
    let fits = tiles(stream);
    let tile = if tile == Tile::Auto || fits.contains(&tile) { tile } else { Tile::Auto };
    let y: Vec<O> = multiply(stream, operands, tile);
    if y != multiply(stream, operands, tile) {
        return Err("the same call twice gave different bits".to_owned());
    }
    let other = fits[operands.x.len() / operands.sizes[0] % fits.len()];
    if y != multiply(stream, operands, other) {
        return Err(format!("{tile:?} and {other:?} give different bits"));
    }
    let used = operands.permutation.slots().len() * operands.sizes[1];
    if y[used..].iter().any(|value| *value != O::poison()) {
        return Err("a row of no expert was written".to_owned());
    }
    Ok(y[..used].to_vec())
}

fn check_case<O: Output>(stream: &Stream, case: &Case) -> Result<(), String> {
    let ([d, n], permutation) = (case.sizes, case.permutation());
    let (x, up, down, bias) = (case.x(), case.up(), case.down(), case.bias());
    let bound = if size_of::<O>() == 4 { F32 } else { BF16 };
    let bias = bias.as_deref();

    let first = Operands {
        x: &x,
        sizes: [d, n],
        weights: &up,
        bias,
        epilogue: case.epilogue,
        permutation: &permutation,
        gathered: true,
    };
    let h: Vec<O> = checked(stream, first, case.tile)?;
    let h: Vec<f32> = h.into_iter().map(Into::into).collect();
    let x = floats(&x);
    let permuted = permutation.permute(&x, d).unwrap();
    close(&h, &products(&permuted, [d, n], &up, bias, case.epilogue, &permutation), n, bound)
        .map_err(|what| format!("first product: {what}"))?;

    let h: Vec<bf16> = h.into_iter().map(bf16::from_f32).collect();
    // Rows of no expert hold what must not matter.
    let mut rows = vec![bf16::NAN; case.num_tokens * case.topk * n];
    rows[..h.len()].copy_from_slice(&h);
    let second = Operands {
        x: &rows,
        sizes: [n, d],
        weights: &down,
        bias: None,
        epilogue: Epilogue::Linear,
        permutation: &permutation,
        gathered: false,
    };
    let y: Vec<O> = checked(stream, second, case.tile)?;
    let y: Vec<f32> = y.into_iter().map(Into::into).collect();
    close(&y, &products(&floats(&h), [n, d], &down, None, Epilogue::Linear, &permutation), d, bound)
        .map_err(|what| format!("second product: {what}"))?;

    if case.epilogue == Epilogue::Linear {
        return Ok(());
    }
    let both = reference::grouped_gemm(&x, d, &experts(case, &up, &down, bias), &permutation).unwrap();
    close(&y, &both, d, BF16).map_err(|what| format!("both products: {what}"))
}

fn check(stream: &Stream, case: &Case) -> Result<(), String> {
    if case.wide { check_case::<f32>(stream, case) } else { check_case::<bf16>(stream, case) }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference_over_all_shapes() {
    on_gpu(|stream| {
        let tried = |case: Case| check(stream, &case).map_err(TestCaseError::fail);
        runner().run(&any_case(), tried).unwrap();
    });
}

fn case(num_tokens: usize, experts: usize, topk: usize, sizes: [usize; 2], epilogue: Epilogue) -> Case {
    let (flavour, tile) = (Flavour::Uniform, Tile::Auto);
    Case { num_tokens, experts, topk, sizes, flavour, epilogue, tile, bias: false, wide: false, seed: 11 }
}

/// Segments of many tiles, inner dimensions of many steps, and bands of more than 16 tiles of rows.
#[test]
#[ignore = "needs a CUDA GPU"]
fn long_segments_and_deep_products() {
    on_gpu(|stream| {
        for tile in tiles(stream) {
            let deep = Case { tile, ..case(300, 3, 2, [2048, 776], Epilogue::SwiGlu) };
            check(stream, &deep).unwrap();
            let long = Case { tile, flavour: Flavour::Skewed, ..case(3000, 5, 2, [72, 520], Epilogue::SwiGlu) };
            check(stream, &long).unwrap();
            let biased = Case { tile, bias: true, ..case(700, 2, 1, [264, 384], Epilogue::Gelu) };
            check(stream, &biased).unwrap();
        }
    });
}

/// Also where the poisoned row lies in a tile with others, and where the inner dimension ends within a step.
#[test]
#[ignore = "needs a CUDA GPU"]
fn nan_and_infinity_stay_with_their_token() {
    on_gpu(|stream| {
        for epilogue in [Epilogue::SwiGlu, Epilogue::Linear, Epilogue::Relu, Epilogue::Gelu] {
            for tile in tiles(stream) {
                let case = case(90, 4, 2, [200, 104], epilogue);
                let permutation = case.permutation();
                let (clean, up) = (case.x(), case.up());
                let mut dirty = clean.clone();
                dirty[17 * 200 + 199] = bf16::NAN;
                dirty[40 * 200 + 3] = bf16::INFINITY;
                let operands = Operands {
                    x: &clean,
                    sizes: [200, 104],
                    weights: &up,
                    bias: None,
                    epilogue,
                    permutation: &permutation,
                    gathered: true,
                };
                let clean: Vec<bf16> = multiply(stream, operands, tile);
                let dirty: Vec<bf16> = multiply(stream, Operands { x: &dirty, ..operands }, tile);
                for (row, slot) in permutation.slots().iter().enumerate() {
                    let (clean, dirty) = (&clean[row * 104..][..104], &dirty[row * 104..][..104]);
                    match slot / 2 {
                        17 => assert!(dirty.iter().all(|value| value.is_nan()), "{epilogue:?} {tile:?}"),
                        40 => assert!(dirty.iter().any(|value| !value.is_finite()), "{epilogue:?} {tile:?}"),
                        _ => assert_eq!(clean, dirty, "{epilogue:?} {tile:?}"),
                    }
                }
            }
        }
    });
}

/// Anything that waits for the stream, allocates on the side or asks for the counts would break the capture or the replay.
#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_in_a_graph_and_replayed_with_other_routings() {
    on_gpu(|stream| {
        for tile in tiles(stream) {
            let case = |seed, flavour| Case { flavour, seed, ..case(150, 20, 3, [136, 72], Epilogue::SwiGlu) };
            let routings = [
                case(1, Flavour::Uniform).permutation(),
                case(2, Flavour::OneChoice).permutation(),
                case(3, Flavour::Nobody).permutation(),
                case(4, Flavour::Dropped).permutation(),
                case(1, Flavour::Uniform).permutation(),
            ];
            let case = case(1, Flavour::Uniform);
            let (x, up) = (case.x(), case.up());
            let operands = |permutation| Operands {
                x: &x,
                sizes: case.sizes,
                weights: &up,
                bias: None,
                epilogue: case.epilogue,
                permutation,
                gathered: true,
            };
            let mut call: Call<bf16> = Call::new(stream, operands(&routings[0]));
            stream.synchronize().unwrap();
            let raw = stream.cudarc();
            raw.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            let launched = call.launch(stream, tile);
            let graph = raw.end_capture(CUgraphInstantiate_flags(0)).unwrap().unwrap();
            launched.unwrap();

            let poison = vec![bf16::poison(); 150 * 3 * 72];
            for permutation in &routings {
                call.offsets.fill(stream, &offsets(permutation));
                call.slots.as_mut().unwrap().fill(stream, &slots(permutation));
                call.y.fill(stream, &poison);
                graph.launch().unwrap();
                assert_eq!(call.read(stream), multiply::<bf16>(stream, operands(permutation), tile), "{tile:?}");
            }
        }
    });
}

/// Whatever stands in device memory, nothing outside of the buffers is touched.
#[test]
#[ignore = "needs a CUDA GPU"]
fn broken_offsets_and_slots_stay_within_bounds() {
    on_gpu(|stream| {
        let case = case(60, 6, 2, [64, 40], Epilogue::SwiGlu);
        let permutation = case.permutation();
        let (x, up) = (case.x(), case.up());
        let operands = Operands {
            x: &x,
            sizes: case.sizes,
            weights: &up,
            bias: None,
            epilogue: case.epilogue,
            permutation: &permutation,
            gathered: true,
        };
        for tile in tiles(stream) {
            for broken in [[0, 500, 3, 90, u32::MAX, 7, 119], [u32::MAX; 7], [120, 0, 120, 0, 120, 0, 120]] {
                let mut call: Call<bf16> = Call::new(stream, operands);
                call.offsets.fill(stream, &broken);
                call.slots.as_mut().unwrap().fill(stream, &[u32::MAX - 3; 120]);
                call.launch(stream, tile).unwrap();
                call.read(stream);
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn allocating_form_clears_the_rows_of_no_expert() {
    on_gpu(|stream| {
        let case = Case { flavour: Flavour::Dropped, ..case(33, 7, 3, [48, 24], Epilogue::SwiGlu) };
        let permutation = case.permutation();
        let (x, up) = (case.x(), case.up());
        let operands = Operands {
            x: &x,
            sizes: case.sizes,
            weights: &up,
            bias: None,
            epilogue: case.epilogue,
            permutation: &permutation,
            gathered: true,
        };
        let mut expected: Vec<bf16> = multiply(stream, operands, Tile::Auto);
        let used = permutation.slots().len() * 24;
        assert!(used < expected.len());
        expected[used..].fill(bf16::ZERO);
        let call: Call<bf16> = Call::new(stream, operands);
        let input = GroupedGemmInput {
            x: call.x.view(),
            weights: call.weights.view(),
            bias: None,
            expert_offsets: call.offsets.view(),
            gather: call.slots.as_ref().map(|slots| Gather { slots: slots.view(), topk: 3 }),
            epilogue: case.epilogue,
            tile: Tile::Auto,
        };
        let y = grouped_gemm::<bf16>(stream, &input).unwrap();
        assert_eq!(stream.download(&y.view()).unwrap(), expected);
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let refused = |x: [usize; 2], weights: [usize; 3], bias: bool, offsets: usize, slots: usize, epilogue| {
            let (x, weights) = (stream.zeros::<bf16>(x).unwrap(), stream.zeros::<bf16>(weights).unwrap());
            let bias = bias.then(|| stream.zeros::<f32>([4, 16]).unwrap());
            let (offsets, slots) = (stream.zeros::<u32>([offsets]).unwrap(), stream.zeros::<u32>([slots]).unwrap());
            let input = GroupedGemmInput {
                x: x.view(),
                weights: weights.view(),
                bias: bias.as_ref().map(|bias| bias.view()),
                expert_offsets: offsets.view(),
                gather: Some(Gather { slots: slots.view(), topk: 2 }),
                epilogue,
                tile: Tile::Auto,
            };
            grouped_gemm::<bf16>(stream, &input).unwrap_err().to_string()
        };
        let swiglu = Epilogue::SwiGlu;
        assert_eq!(
            refused([3, 24], [4, 32, 16], false, 5, 6, swiglu),
            "grouped_gemm: weights must be [4, 32, 24], got [4, 32, 16]"
        );
        assert_eq!(
            refused([3, 20], [4, 32, 20], false, 5, 6, swiglu),
            "grouped_gemm: in features must be a multiple of 8 from 8 to 2^30, got 20"
        );
        assert_eq!(
            refused([3, 24], [4, 24, 24], false, 5, 6, swiglu),
            "grouped_gemm: out features must be a multiple of 8 from 8 to 2^30, got 12"
        );
        assert_eq!(
            refused([3, 24], [4, 32, 24], true, 5, 6, swiglu),
            "grouped_gemm: bias must be [4, 32], got [4, 16]"
        );
        assert_eq!(
            refused([3, 24], [4, 32, 24], false, 4, 6, swiglu),
            "grouped_gemm: expert_offsets must be [5], got [4]"
        );
        assert_eq!(
            refused([3, 24], [4, 32, 24], true, 5, 6, Epilogue::Linear),
            "grouped_gemm: bias must be [4, 32], got [4, 16]"
        );
        assert_eq!(
            refused([3, 24], [0, 32, 24], false, 1, 6, swiglu),
            "grouped_gemm: number of experts must be from 1 to 1024, got 0"
        );
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn an_unaligned_tensor_is_refused() {
    on_gpu(|stream| {
        let x = Guarded::holding(stream, [8, 8], &[bf16::ONE; 64], bf16::ZERO, 1);
        let weights = stream.zeros::<bf16>([1, 8, 8]).unwrap();
        let offsets = stream.upload([2], &[0, 8]).unwrap();
        let input = GroupedGemmInput {
            x: x.view(),
            weights: weights.view(),
            bias: None,
            expert_offsets: offsets.view(),
            gather: None,
            epilogue: Epilogue::Linear,
            tile: Tile::Auto,
        };
        let error = grouped_gemm::<bf16>(stream, &input).unwrap_err().to_string();
        assert_eq!(error, "grouped_gemm: the kernel was not launched: a pointer is not aligned");
    });
}
