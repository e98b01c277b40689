//! Typed device memory with a shape: owned, borrowed and mutably borrowed.

use std::{fmt, ops::Range};

use cudarc::driver::{CudaSlice, CudaView, CudaViewMut, DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};

use crate::{Error, Result, error::check_len};

/// What tensors hold: numbers, and what is made of them.
pub trait Element: DeviceRepr + ValidAsZeroBits + Copy + Default + fmt::Debug + private::Sealed + 'static {}

pub(super) mod private {
    pub trait Sealed {}
}

macro_rules! elements {
    ($($number:ty),*) => {
        $(impl private::Sealed for $number {}
        impl Element for $number {})*
    };
}

elements!(f32, f16, bf16, i32, u32, i64, u64, u8);

/// Sizes of a row-major array, outermost first, of at most four dimensions.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    sizes: [usize; 4],
    rank: usize,
}

impl Shape {
    /// The sizes.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes[..self.rank]
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.sizes().iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

macro_rules! shapes {
    ($($rank:literal),*) => {
        $(impl From<[usize; $rank]> for Shape {
            fn from(from: [usize; $rank]) -> Self {
                let mut sizes = [1; 4];
                sizes[..$rank].copy_from_slice(&from);
                Self { sizes, rank: $rank }
            }
        })*
    };
}

shapes!(1, 2, 3, 4);

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.sizes())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Owned device memory. It is freed, in the order of its stream, when this is dropped.
#[derive(Debug)]
pub struct Tensor<T> {
    /// At least one element, also where the shape has none.
    slice: CudaSlice<T>,
    shape: Shape,
}

impl<T: Element> Tensor<T> {
    pub(super) fn from_parts(slice: CudaSlice<T>, shape: Shape) -> Self {
        Self { slice, shape }
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// To read.
    pub fn view(&self) -> View<'_, T> {
        View { view: self.slice.slice(..self.shape.len()), shape: self.shape }
    }

    /// To write.
    pub fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut { view: self.slice.slice_mut(..self.shape.len()), shape: self.shape }
    }

    /// To read as many elements as `shape` has, from element `start` on: a batch's rows of a buffer that holds more.
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not hold them.
    pub fn part(&self, start: usize, shape: impl Into<Shape>) -> Result<View<'_, T>> {
        let shape = shape.into();
        Ok(View { view: self.slice.slice(self.range(start, shape)?), shape })
    }

    /// To write them.
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not hold them.
    pub fn part_mut(&mut self, start: usize, shape: impl Into<Shape>) -> Result<ViewMut<'_, T>> {
        let shape = shape.into();
        let range = self.range(start, shape)?;
        Ok(ViewMut { view: self.slice.slice_mut(range), shape })
    }

    /// To write two parts that follow each other from the first element on.
    ///
    /// # Errors
    /// [`Error::Shape`] if it does not hold both.
    pub fn parts_mut(
        &mut self,
        first: impl Into<Shape>,
        second: impl Into<Shape>,
    ) -> Result<(ViewMut<'_, T>, ViewMut<'_, T>)> {
        let (first, second) = (first.into(), second.into());
        self.range(first.len(), second)?;
        let (low, high) = self.slice.split_at_mut(first.len());
        Ok((ViewMut { view: low, shape: first }, ViewMut { view: high, shape: second }))
    }

    fn range(&self, start: usize, shape: Shape) -> Result<Range<usize>> {
        match start.checked_add(shape.len()) {
            Some(end) if end <= self.shape.len() => Ok(start..end),
            _ => Err(Error::Shape {
                operation: "tensor part",
                argument: "shape",
                expected: format!("at most {} elements from element {start} on", self.shape.len()),
                got: shape.to_string(),
            }),
        }
    }
}

/// Borrowed device memory to read.
#[derive(Debug)]
pub struct View<'a, T> {
    view: CudaView<'a, T>,
    shape: Shape,
}

impl<'a, T: Element> View<'a, T> {
    /// A view of cudarc's with a shape.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the lengths differ.
    pub fn new(view: CudaView<'a, T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        check_len("View::new", "view", view.len(), shape.len())?;
        Ok(Self { view, shape })
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The view, for cudarc.
    pub fn cudarc(&self) -> &CudaView<'a, T> {
        &self.view
    }
}

/// Borrowed device memory to write.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    view: CudaViewMut<'a, T>,
    shape: Shape,
}

impl<'a, T: Element> ViewMut<'a, T> {
    /// A view of cudarc's with a shape.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if the lengths differ.
    pub fn new(view: CudaViewMut<'a, T>, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        check_len("ViewMut::new", "view", view.len(), shape.len())?;
        Ok(Self { view, shape })
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// To read.
    pub fn view(&self) -> View<'_, T> {
        View { view: self.view.as_view(), shape: self.shape }
    }

    /// The view, for cudarc.
    pub fn cudarc(&mut self) -> &mut CudaViewMut<'a, T> {
        &mut self.view
    }
}

#[cfg(test)]
mod tests {
    use super::Shape;

    #[test]
    fn shapes_count_their_elements() {
        let shape = Shape::from([3, 0, 5]);
        assert_eq!((shape.sizes(), shape.len(), shape.is_empty()), (&[3, 0, 5][..], 0, true));
        assert_eq!((Shape::from([4, 6]).len(), Shape::from([4, 6]).to_string()), (24, "[4, 6]".to_owned()));
        assert_ne!(Shape::from([4]), Shape::from([4, 1]));
    }
}
