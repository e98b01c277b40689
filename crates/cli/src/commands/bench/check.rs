//! The measured layer's output against the float32 reference, on a few tokens.

use super::{measure::driver, shapes::Shape};
use crate::failure::Failure;
use anabranch::{
    Dtype,
    cuda::{Stream, Tensor},
    reference::{Expert, Matrix, Permutation, combine, expert_forward, grouped_gemm},
};
use half::bf16;
use std::collections::BTreeSet;

/// Tokens to compare, at most.
const TOKENS: usize = 8;
/// Bytes of weights to bring to the host, at most, beyond what one token needs.
const BYTES: usize = 1 << 30;

/// `||out - reference|| / ||reference||` over some tokens of a call. Of the weights only those of experts that these tokens visit are
/// brought to the host.
pub(super) fn relative_error(
    stream: &Stream,
    shape: &Shape,
    num_shared: usize,
    [x, out, gate_up, down]: [&Tensor<bf16>; 4],
    ids: &[i32],
    topk_weights: &[f32],
) -> Result<f64, Failure> {
    let (d, n, topk) = (shape.hidden, shape.intermediate, shape.topk);
    let tokens = sampled(ids, topk, 2 * shape.expert());
    let part = |tensor: &Tensor<bf16>, index: usize, size: usize| {
        stream.cudarc().clone_dtoh(&tensor.view().cudarc().slice(index * size..(index + 1) * size)).map_err(driver)
    };
    let rows = |tensor: &Tensor<bf16>| -> Result<Vec<f32>, Failure> {
        let rows = tokens.iter().map(|token| part(tensor, *token, d)).collect::<Result<Vec<_>, _>>()?;
        Ok(rows.concat().into_iter().map(bf16::to_f32).collect())
    };
    let (x, got) = (rows(x)?, rows(out)?);

    let pairs = |token: &usize| token * topk..(token + 1) * topk;
    let visited: BTreeSet<i32> = tokens.iter().flat_map(|token| ids[pairs(token)].iter().copied()).collect();
    let visited: Vec<i32> = visited.into_iter().collect();
    // Experts by their place among those visited, shared ones last.
    let place = |id: i32| visited.binary_search(&id).map_or(-1, |at| at as i32);
    let chosen: Vec<i32> = tokens.iter().flat_map(|token| ids[pairs(token)].iter().map(|id| place(*id))).collect();
    let scales: Vec<f32> = tokens.iter().flat_map(|token| topk_weights[pairs(token)].iter().copied()).collect();
    let experts = visited.iter().map(|id| *id as usize).chain(shape.experts..shape.experts + num_shared);
    let weights = experts
        .map(|expert| Ok((part(gate_up, expert, 2 * n * d)?, part(down, expert, n * d)?)))
        .collect::<Result<Vec<_>, Failure>>()?;
    let experts = weights
        .iter()
        .map(|(gate_up, down)| {
            let gate_up = Matrix::new(Dtype::Bf16, 2 * n, d, bytemuck::cast_slice(gate_up))?;
            Expert::swiglu_stacked(gate_up, Matrix::new(Dtype::Bf16, d, n, bytemuck::cast_slice(down))?)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let (routed, shared) = experts.split_at(visited.len());

    let permutation = Permutation::new(&chosen, topk, visited.len())?;
    let mut expected = combine(&grouped_gemm(&x, d, routed, &permutation)?, &scales, &permutation, d)?;
    for expert in shared {
        let y = expert_forward(&x, tokens.len(), expert)?;
        expected.iter_mut().zip(y).for_each(|(sum, y)| *sum += y);
    }
    let square = |sum: f64, value: f64| sum + value * value;
    let error = got.iter().zip(&expected).map(|(a, b)| f64::from(*a) - f64::from(*b)).fold(0.0, square);
    let norm = expected.iter().map(|b| f64::from(*b)).fold(0.0, square);
    Ok((error / norm).sqrt())
}

/// Tokens from the first to the last, as many as there may be.
fn sampled(ids: &[i32], topk: usize, expert_bytes: usize) -> Vec<usize> {
    let all = ids.len() / topk;
    let count = all.min(TOKENS);
    let mut visited = BTreeSet::new();
    let mut tokens = Vec::new();
    for token in (0..count).map(|at| if count == 1 { 0 } else { at * (all - 1) / (count - 1) }) {
        visited.extend(ids[token * topk..(token + 1) * topk].iter().copied());
        if !tokens.is_empty() && visited.len() * expert_bytes > BYTES {
            break;
        }
        tokens.push(token);
    }
    tokens
}

#[cfg(test)]
mod tests {
    use super::sampled;

    #[test]
    fn tokens_are_as_many_as_their_experts_allow() {
        let ids: Vec<i32> = (0..100).flat_map(|token| [token % 10, 10 + token % 7]).collect();
        assert_eq!(sampled(&ids, 2, 1), [0, 14, 28, 42, 56, 70, 84, 99]);
        assert_eq!(sampled(&ids[..2], 2, 1), [0]);
        assert_eq!(sampled(&ids, 2, 1 << 30), [0]);
        assert!(sampled(&[], 2, 1).is_empty());
    }
}
