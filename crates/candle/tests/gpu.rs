//! On a GPU: the same layer by candle and by this library, and refusals that need one.

mod support;

use anabranch_candle::{Experts, FusedMoe, Routing, moe_forward};
use candle_core::{DType, Device, IndexOp, Module, Result, Tensor};
use candle_nn::linear_no_bias;
use support::Sizes;

const CASES: [Sizes; 3] = [
    Sizes { experts: 8, topk: 2, hidden: 64, width: 32 },
    Sizes { experts: 32, topk: 4, hidden: 256, width: 128 },
    Sizes { experts: 64, topk: 6, hidden: 512, width: 256 },
];

/// Tokens whose choice does not hang on a tie: candle ranks equal logits in any order.
fn untied(logits: &Tensor, topk: usize) -> Result<Vec<usize>> {
    let rows = logits.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    let decided = |row: &Vec<f32>| {
        let mut sorted = row.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.get(topk).is_none_or(|next| *next < sorted[topk - 1])
    };
    Ok((0..rows.len()).filter(|token| decided(&rows[*token])).collect())
}

/// The relative Frobenius error of some rows.
fn error(ours: &Tensor, theirs: &Tensor, rows: &[usize]) -> Result<f64> {
    let values = |tensor: &Tensor| tensor.i(0)?.to_dtype(DType::F32)?.to_vec2::<f32>();
    let (ours, theirs) = (values(ours)?, values(theirs)?);
    let (mut difference, mut norm) = (0.0, 0.0);
    for row in rows {
        for (a, b) in ours[*row].iter().zip(&theirs[*row]) {
            difference += f64::from(a - b).powi(2);
            norm += f64::from(*b).powi(2);
        }
    }
    Ok((difference / norm).sqrt())
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn the_layer_is_candles() -> Result<()> {
    let device = Device::new_cuda(0)?;
    device.set_seed(2026)?;
    for sizes in CASES {
        for renormalize in [true, false] {
            let (config, weights) = (sizes.config(renormalize), sizes.weights(DType::BF16, &device)?);
            let ours = FusedMoe::new(&config, weights.clone(), DType::BF16)?;
            let theirs = candle_transformers::fused_moe::FusedMoe::new(&config, weights.clone(), DType::BF16)?;
            let gate = linear_no_bias(sizes.hidden, sizes.experts, weights.pp("gate"))?;
            for tokens in [1, 7, 64, 300] {
                let xs = Tensor::randn(0_f32, 1.0, (1, tokens, sizes.hidden), &device)?.to_dtype(DType::BF16)?;
                let rows = untied(&gate.forward(&xs.i(0)?)?, sizes.topk)?;
                let (ours, theirs) = (ours.forward(&xs, tokens > 1)?, theirs.forward(&xs, tokens > 1)?);
                assert_eq!((ours.dims(), ours.dtype()), (theirs.dims(), theirs.dtype()));
                if !rows.is_empty() {
                    // candle rounds every expert's weighted part to bf16, this library the sum.
                    let error = error(&ours, &theirs, &rows)?;
                    assert!(error < 1e-2, "{sizes:?}, {tokens} tokens: relative error {error:e}");
                }
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn a_view_is_read_where_it_lies_and_bits_repeat() -> Result<()> {
    let device = Device::new_cuda_with_stream(0)?;
    let noise = |shape: &[usize], size: f32| Tensor::randn(0_f32, size, shape, &device)?.to_dtype(DType::BF16);
    let experts = Experts::new(noise(&[8, 64, 64], 0.1)?, noise(&[8, 64, 32], 0.1)?)?;
    let routing = Routing::builder(8, 2).build().map_err(candle_core::Error::wrap)?;
    let all = noise(&[40, 64], 1.0)?;
    let logits = Tensor::randn(0_f32, 1.0, (40, 8), &device)?;
    let whole = moe_forward(&all, &logits, &experts, &routing)?;
    let again = moe_forward(&all, &logits, &experts, &routing)?;
    let bits = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_vec2::<f32>();
    assert_eq!(bits(&whole)?, bits(&again)?);
    let part = moe_forward(&all.narrow(0, 8, 16)?, &logits.narrow(0, 8, 16)?, &experts, &routing)?;
    let difference = (part.to_dtype(DType::F32)? - whole.narrow(0, 8, 16)?.to_dtype(DType::F32)?)?.abs()?;
    assert!(difference.max_all()?.to_scalar::<f32>()? < 0.05);
    assert_eq!(moe_forward(&all.narrow(0, 0, 0)?, &logits.narrow(0, 0, 0)?, &experts, &routing)?.dims(), [0, 64]);
    Ok(())
}

#[test]
#[ignore = "needs a CUDA GPU"]
fn bad_tensors_are_refused_in_words() -> Result<()> {
    let device = Device::new_cuda(0)?;
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &device);
    let experts = Experts::new(zeros(&[8, 64, 64], DType::BF16)?, zeros(&[8, 64, 32], DType::BF16)?)?;
    let routing = Routing::builder(8, 2).build().map_err(candle_core::Error::wrap)?;
    let (x, logits) = (zeros(&[5, 64], DType::BF16)?, zeros(&[5, 8], DType::F32)?);
    let refused = |x: &Tensor, logits: &Tensor, words: &str| {
        let message =
            moe_forward(x, logits, &experts, &routing).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message.contains(words), "{message:?} does not say {words:?}");
    };
    refused(&zeros(&[5, 64], DType::F16)?, &logits, "x must be BF16, got F16");
    refused(&x, &zeros(&[5, 8], DType::BF16)?, "logits must be F32, got BF16");
    refused(&x, &zeros(&[4, 8], DType::F32)?, "logits must be [5, 8], got [4, 8]");
    refused(&x, &zeros(&[8, 5], DType::F32)?.t()?, "logits must be contiguous");
    refused(&x, &Tensor::zeros((5, 8), DType::F32, &Device::Cpu)?, "logits must be on");
    refused(&zeros(&[5, 72], DType::BF16)?.narrow(1, 0, 64)?, &logits, "x must be contiguous");
    Ok(())
}
