//! What several operations check before a launch, and how they tell the kernels a data type.

use half::bf16;

use super::{Element, Shape, sys};
use crate::{Dtype, Error, Result};

/// Numbers of a tensor that may be stored in more than one type.
pub trait Float: Element {
    /// The type.
    const DTYPE: Dtype;
}

impl Float for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl Float for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

/// A data type as the header has it.
pub(super) fn dtype<T: Float>() -> sys::AnabranchDtype {
    match T::DTYPE {
        Dtype::F32 => sys::AnabranchDtype::ANABRANCH_DTYPE_F32,
        Dtype::F16 => sys::AnabranchDtype::ANABRANCH_DTYPE_F16,
        Dtype::Bf16 => sys::AnabranchDtype::ANABRANCH_DTYPE_BF16,
        Dtype::F8E4m3 => sys::AnabranchDtype::ANABRANCH_DTYPE_F8_E4M3,
    }
}

/// The rows and columns of a matrix.
pub(super) fn matrix(operation: &'static str, argument: &'static str, shape: Shape) -> Result<[usize; 2]> {
    match *shape.sizes() {
        [rows, columns] => Ok([rows, columns]),
        _ => Err(Error::Shape {
            operation,
            argument,
            expected: "a matrix, [rows, columns]".to_owned(),
            got: shape.to_string(),
        }),
    }
}

/// A size that the kernels take in 32 bits.
pub(super) fn size(operation: &'static str, setting: &'static str, value: usize) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::Setting {
        operation,
        setting,
        expected: "below 2^32".to_owned(),
        got: value.to_string(),
    })
}

/// Heads that stand side by side in the rows of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRange {
    /// The column that the first head begins with.
    pub column: usize,
    /// Number of heads.
    pub num_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl HeadRange {
    /// Elements of all heads of a row.
    pub fn width(&self) -> usize {
        self.num_heads.saturating_mul(self.head_dim)
    }

    /// Checks that rows of `columns` hold the heads.
    pub(super) fn check(&self, operation: &'static str, argument: &'static str, columns: usize) -> Result<()> {
        let end = self.column.saturating_add(self.width());
        if end <= columns {
            return Ok(());
        }
        let expected = format!("at least {end} columns wide, to hold {self:?}");
        Err(Error::Shape { operation, argument, expected, got: columns.to_string() })
    }
}
