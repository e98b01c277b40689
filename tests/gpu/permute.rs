//! permute: offsets, slots and their inverse; rows in permuted order.

use anabranch::{
    Error,
    cuda::{
        NO_SLOT, PermuteBuffers, Stream, permute, permute_into, permute_rows, permute_rows_into, permute_workspace,
    },
    reference,
};
use half::bf16;
use proptest::{prelude::*, test_runner::TestCaseError};

use crate::{
    numbers::{bits, capture, normals},
    support::{Guarded, Noise, on_gpu, runner},
};

/// Who gets the tokens.
#[derive(Debug, Clone, Copy)]
enum Load {
    Even,
    /// Expert e about 1 / (e + 1) as often as expert 0.
    Skewed,
    One,
    /// Every other pair nowhere, some ids no expert's.
    Holes,
    Nowhere,
}

#[derive(Debug, Clone)]
struct Case {
    num_tokens: usize,
    topk: usize,
    num_experts: usize,
    load: Load,
    seed: u64,
}

impl Case {
    fn ids(&self) -> Vec<i32> {
        let mut noise = Noise(self.seed);
        let experts = self.num_experts as f32;
        (0..self.num_tokens * self.topk)
            .map(|_| {
                let even = (noise.bits() % self.num_experts as u64) as i32;
                match self.load {
                    Load::Even => even,
                    Load::Skewed => ((experts + 1.0).powf(noise.uniform()) as i32 - 1).clamp(0, even.max(1) - 1),
                    Load::One => self.num_experts as i32 / 2,
                    Load::Holes => match noise.bits() % 8 {
                        0..=3 => -1,
                        4 => [self.num_experts as i32, i32::MAX, i32::MIN, -2][noise.bits() as usize % 4],
                        _ => even,
                    },
                    Load::Nowhere => -1,
                }
            })
            .collect()
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let load = prop::sample::select(vec![Load::Even, Load::Even, Load::Skewed, Load::One, Load::Holes, Load::Nowhere]);
    let experts = prop_oneof![
        1..=1024_usize,
        1..=300_usize,
        prop::sample::select(vec![1, 8, 60, 64, 128, 256, 288, 289, 384, 576, 577, 1024]),
    ];
    // Up to 8,192 pairs take one block, more take several.
    let tokens = prop_oneof![4 => 0..300_usize, 1 => 0..3_usize, 1 => 250..3000_usize];
    (tokens, 1..=32_usize, experts, load, any::<u64>()).prop_map(|(num_tokens, topk, num_experts, load, seed)| Case {
        num_tokens,
        topk,
        num_experts,
        load,
        seed,
    })
}

/// Device buffers of one call, poisoned and guarded.
struct Call {
    ids: Guarded<i32>,
    workspace: Guarded<u8>,
    offsets: Guarded<u32>,
    slots: Guarded<u32>,
    inverse: Guarded<i32>,
}

/// Offsets, slots and inverse.
type Permuted = (Vec<u32>, Vec<u32>, Vec<i32>);

impl Call {
    fn new(stream: &Stream, ids: &[i32], topk: usize, num_experts: usize) -> Self {
        let num_tokens = ids.len() / topk;
        let bytes = permute_workspace(num_tokens, topk, num_experts).unwrap();
        Self {
            ids: Guarded::holding(stream, [num_tokens, topk], ids, 3, 1),
            workspace: Guarded::new(stream, [bytes], 0xa5, 0),
            offsets: Guarded::new(stream, [num_experts + 1], 0xdead, 0),
            slots: Guarded::new(stream, [ids.len()], 0xbeef, 1),
            inverse: Guarded::new(stream, [num_tokens, topk], 0x5eed, 3),
        }
    }

    fn launch(&mut self, stream: &Stream) -> Result<(), Error> {
        let mut output = PermuteBuffers {
            expert_offsets: self.offsets.view_mut(),
            slots: self.slots.view_mut(),
            inverse: self.inverse.view_mut(),
        };
        permute_into(stream, &self.ids.view(), &mut self.workspace.view_mut(), &mut output)
    }

    fn read(&self, stream: &Stream) -> Permuted {
        self.workspace.read(stream);
        self.ids.read(stream);
        (self.offsets.read(stream), self.slots.read(stream), self.inverse.read(stream))
    }
}

fn permuted(stream: &Stream, ids: &[i32], topk: usize, num_experts: usize) -> Permuted {
    let mut call = Call::new(stream, ids, topk, num_experts);
    call.launch(stream).unwrap();
    call.read(stream)
}

/// The reference, which refuses ids that are no expert's: they count as -1 here.
fn sorted(ids: &[i32], topk: usize, num_experts: usize) -> reference::Permutation {
    let known: Vec<i32> = ids.iter().map(|id| if (0..num_experts as i32).contains(id) { *id } else { -1 }).collect();
    reference::Permutation::new(&known, topk, num_experts).unwrap()
}

fn expected(ids: &[i32], topk: usize, num_experts: usize) -> Permuted {
    let sorted = sorted(ids, topk, num_experts);
    let offsets = sorted.expert_offsets().iter().map(|offset| *offset as u32).collect();
    let mut slots: Vec<u32> = sorted.slots().iter().map(|slot| *slot as u32).collect();
    slots.resize(ids.len(), NO_SLOT);
    (offsets, slots, sorted.inverse().iter().map(|row| row.map_or(-1, |row| row as i32)).collect())
}

fn check_case(stream: &Stream, case: &Case) -> Result<(), String> {
    let ids = case.ids();
    let got = permuted(stream, &ids, case.topk, case.num_experts);
    if got != permuted(stream, &ids, case.topk, case.num_experts) {
        return Err("the same call twice gave different results".to_owned());
    }
    let expected = expected(&ids, case.topk, case.num_experts);
    if got == expected { Ok(()) } else { Err(format!("{got:?}\n not {expected:?}")) }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn agrees_with_the_reference() {
    on_gpu(|stream| {
        let tried = |case: Case| check_case(stream, &case).map_err(TestCaseError::fail);
        runner().run(&any_case(), tried).unwrap();
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_million_tokens() {
    on_gpu(|stream| {
        for (num_experts, load) in [(256, Load::Even), (1024, Load::Skewed), (8, Load::Holes)] {
            let case = Case { num_tokens: 1 << 20, topk: 8, num_experts, load, seed: 7 };
            let ids = case.ids();
            // Not `check_case`: its message would hold millions of numbers.
            assert!(permuted(stream, &ids, 8, num_experts) == expected(&ids, 8, num_experts), "{case:?}");
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn rows_move_as_in_the_reference_and_come_back() {
    on_gpu(|stream| {
        let strategy = (any_case(), 1..40_usize);
        let tried = |(case, eighths): (Case, usize)| {
            // The rows' width is what matters here.
            let case = Case { num_tokens: case.num_tokens % 300, ..case };
            check_rows(stream, &case, 8 * eighths).map_err(TestCaseError::fail)
        };
        runner().run(&strategy, tried).unwrap();
        // Rows of more than one item a warp.
        let case = Case { num_tokens: 37, topk: 3, num_experts: 9, load: Load::Holes, seed: 2 };
        for width in [2040, 2048, 2056, 7168] {
            check_rows(stream, &case, width).unwrap();
        }
    });
}

fn check_rows(stream: &Stream, case: &Case, width: usize) -> Result<(), String> {
    let ids = case.ids();
    let (_, slots, inverse) = permuted(stream, &ids, case.topk, case.num_experts);
    let mut x = normals(&mut Noise(case.seed), case.num_tokens * width);
    if let Some(value) = x.last_mut() {
        *value = bf16::NAN;
    }
    let x_device = Guarded::holding(stream, [case.num_tokens, width], &x, bf16::ONE, 0);
    let slots_device = Guarded::holding(stream, [slots.len()], &slots, 1, 1);
    let mut out = Guarded::new(stream, [slots.len(), width], bf16::from_f32(-77.0), 0);
    permute_rows_into(stream, &x_device.view(), &slots_device.view(), case.topk, &mut out.view_mut()).unwrap();
    let out = bits(&out.read(stream));
    let x = bits(&x);
    for (row, slot) in slots.iter().enumerate() {
        let token = *slot as usize / case.topk;
        let expected = if *slot == NO_SLOT { &vec![0; width] } else { &x[token * width..][..width] };
        if out[row * width..][..width] != *expected {
            return Err(format!("row {row} is not token {token}'s"));
        }
    }
    for (pair, row) in inverse.iter().enumerate() {
        if let Ok(row) = usize::try_from(*row)
            && out[row * width..][..width] != x[pair / case.topk * width..][..width]
        {
            return Err(format!("row {row} does not come back to pair {pair}"));
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn is_captured_in_a_graph_and_replayed_with_other_ids() {
    on_gpu(|stream| {
        // One launch, and two.
        for num_tokens in [100, 5000] {
            let case = |seed, load| Case { num_tokens, topk: 8, num_experts: 60, load, seed };
            let (first, second) = (case(1, Load::Even).ids(), case(2, Load::Skewed).ids());
            let mut call = Call::new(stream, &first, 8, 60);
            let graph = capture(stream, || call.launch(stream).unwrap());
            for ids in [&first, &second, &first] {
                call.ids.fill(stream, ids);
                graph.launch().unwrap();
                assert!(call.read(stream) == expected(ids, 8, 60), "{num_tokens} tokens");
            }
        }
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn allocating_forms_agree() {
    on_gpu(|stream| {
        let case = Case { num_tokens: 33, topk: 4, num_experts: 7, load: Load::Holes, seed: 5 };
        let ids = case.ids();
        let device = stream.upload([33, 4], &ids).unwrap();
        let output = permute(stream, &device.view(), 7).unwrap();
        let got: Permuted = (
            stream.download(&output.expert_offsets.view()).unwrap(),
            stream.download(&output.slots.view()).unwrap(),
            stream.download(&output.inverse.view()).unwrap(),
        );
        assert_eq!(got, expected(&ids, 4, 7));
        let x = normals(&mut Noise(1), 33 * 16);
        let rows = permute_rows(stream, &stream.upload([33, 16], &x).unwrap().view(), &output.slots.view(), 4).unwrap();
        let rows = stream.download(&rows.view()).unwrap();
        let x: Vec<f32> = x.iter().map(|x| x.to_f32()).collect();
        let expected = sorted(&ids, 4, 7).permute(&x, 16).unwrap();
        let (valid, rest) = rows.split_at(expected.len());
        assert!(valid.iter().zip(&expected).all(|(got, expected)| got.to_f32() == *expected));
        assert!(rest.iter().all(|value| value.to_bits() == 0));
    });
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_calls_are_refused_before_anything_is_launched() {
    on_gpu(|stream| {
        let ids = |shape: [usize; 2]| stream.zeros::<i32>(shape).unwrap();
        let setting = "permute: the kernel was not launched: a size or setting is out of range or contradicts another";
        let refused = |shape, experts| permute(stream, &ids(shape).view(), experts).unwrap_err().to_string();
        assert_eq!(refused([3, 33], 40), setting);
        assert_eq!(refused([3, 2], 0), setting);
        assert_eq!(refused([3, 2], 1025), setting);
        let flat = stream.zeros::<i32>([6]).unwrap();
        let error = permute(stream, &flat.view(), 4).unwrap_err().to_string();
        assert_eq!(error, "permute: topk_ids must be a matrix, [rows, columns], got [6]");

        let mut call = Call::new(stream, &vec![0; 5000 * 2], 2, 8);
        let bytes = permute_workspace(5000, 2, 8).unwrap();
        assert!(bytes > 0);
        call.workspace = Guarded::new(stream, [bytes - 1], 0xa5, 0);
        let error = call.launch(stream).unwrap_err().to_string();
        assert_eq!(error, format!("permute: workspace must be at least {bytes} bytes, got {}", bytes - 1));
        call.workspace = Guarded::new(stream, [bytes], 0xa5, 1);
        let error = call.launch(stream).unwrap_err().to_string();
        assert_eq!(error, "permute: the kernel was not launched: a pointer is not aligned");

        let x = stream.zeros::<bf16>([3, 12]).unwrap();
        let slots = stream.zeros::<u32>([6]).unwrap();
        let error = permute_rows(stream, &x.view(), &slots.view(), 2).unwrap_err().to_string();
        assert!(error.starts_with("permute_rows: the kernel was not launched: a size"), "{error}");
        let x = Guarded::new(stream, [3, 16], bf16::ONE, 1);
        let error = permute_rows(stream, &x.view(), &slots.view(), 2).unwrap_err().to_string();
        assert_eq!(error, "permute_rows: the kernel was not launched: a pointer is not aligned");
    });
}
