//! What lies on the GPU after loading is the checkpoint, rounded to bf16, bit by bit.

use std::path::Path;

use anabranch_model::{
    BLOCK_SIZE, Backend, Batch, Config, Cuda, Segment, TensorFile,
    weights::{Source, StoredLinear},
};
use half::bf16;
use safetensors::{Dtype, serialize, tensor::TensorView};

use crate::support::{folder, on_gpu};

/// A row is padded to 1008 on the GPU, so that a staging buffer of 16 MiB takes 8,322 of them: the four buffers are filled more than once.
const ROWS: usize = 5 * 8322 + 100;
const WIDTH: usize = 1001;
const PADDED: usize = 1008;
/// Of a block of an FP8 matrix.
const BLOCK: [usize; 2] = [128, 128];

/// A matrix of noise, as a checkpoint has it.
fn stored(dtype: Dtype) -> StoredLinear {
    let size = dtype.bitsize() / 8;
    let mut state = 1_u32;
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(ROWS * WIDTH * size)
    .collect();
    // Without the exponent's highest bit nothing is infinite or NaN.
    bytes.iter_mut().skip(size - 1).step_by(size).for_each(|byte| *byte &= 0xbf);
    let blocks = [ROWS.div_ceil(BLOCK[0]), WIDTH.div_ceil(BLOCK[1])];
    let scales: Vec<u8> = (1..=blocks[0] * blocks[1]).flat_map(|scale| (scale as f32 / 3.0).to_le_bytes()).collect();
    let tensors = [
        ("weight", TensorView::new(dtype, vec![ROWS, WIDTH], &bytes).unwrap()),
        ("scales", TensorView::new(Dtype::F32, blocks.to_vec(), &scales).unwrap()),
    ];
    let file = TensorFile::from_bytes(Path::new("noise"), serialize(tensors, None).unwrap()).unwrap();
    let scales = (dtype == Dtype::F8_E4M3).then(|| (file.get("scales").unwrap(), BLOCK));
    StoredLinear { weight: Source::Stored { tensor: file.get("weight").unwrap(), scales }, bias: None }
}

/// Compares all rows, which the embedding of their numbers gives, with what the CPU reads.
fn check(gpu: &Cuda, config: &Config, weights: &StoredLinear, what: &str) {
    let table = gpu.load_table(weights).unwrap();
    let expected = weights.matrix().unwrap().to_vec::<f32>();
    let mut expected = expected.chunks_exact(WIDTH);
    let ids: Vec<u32> = (0..ROWS as u32).collect();
    let blocks: Vec<u32> = (0..64).collect();
    let mut cache = gpu.cache(config, blocks.len()).unwrap();
    for ids in ids.chunks(blocks.len() * BLOCK_SIZE) {
        let segments = [Segment { blocks: &blocks, position: 0, len: ids.len() }];
        gpu.embed(config, &table, &Batch { ids, segments: &segments }, &mut cache).unwrap();
        let got = gpu.residual(config, &mut cache).unwrap();
        for ((id, got), expected) in ids.iter().zip(got.chunks_exact(PADDED)).zip(&mut expected) {
            let (got, padding) = got.split_at(WIDTH);
            let same = |(got, value): (&f32, &f32)| got.to_bits() == bf16::from_f32(*value).to_f32().to_bits();
            assert!(got.iter().zip(expected).all(same), "{what}: row {id}");
            assert!(padding.iter().all(|value| value.to_bits() == 0), "{what}: the padding of row {id}");
        }
    }
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn loading_is_the_checkpoint_bit_by_bit() {
    on_gpu(|gpu| {
        // As wide as the rows with their padding, to see that as well.
        let config = Config { hidden_size: PADDED, ..Config::from_dir(&folder("llama")).unwrap() };
        let gpu = gpu();
        for dtype in [Dtype::BF16, Dtype::F32, Dtype::F16, Dtype::F8_E4M3] {
            check(&gpu, &config, &stored(dtype), &format!("{dtype}"));
        }
        // With the buffers given back in between.
        gpu.loaded().unwrap();
        check(&gpu, &config, &stored(Dtype::BF16), "once more");
    });
}
