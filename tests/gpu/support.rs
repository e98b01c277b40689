//! What the tests of all operations share.

use std::env;

use anabranch::{
    Error,
    cuda::{Device, Element, Shape, Stream, View, ViewMut, cudarc::driver::CudaSlice},
};
use proptest::test_runner::{Config, TestRunner};

/// Runs a test on a stream of its own. Without a GPU it passes with a note, or fails under `ANABRANCH_REQUIRE_GPU=1`.
pub(crate) fn on_gpu(test: impl FnOnce(&Stream)) {
    match Device::open(0) {
        Ok(device) => {
            let stream = device.new_stream().unwrap();
            test(&stream);
            stream.synchronize().unwrap();
        }
        Err(error @ Error::NoGpu { .. }) if env::var("ANABRANCH_REQUIRE_GPU").as_deref() != Ok("1") => {
            println!("skipped: {error}");
        }
        Err(error) => panic!("{error}"),
    }
}

/// Cases of a property.
pub(crate) fn runner() -> TestRunner {
    let cases = env::var("ANABRANCH_CASES").map_or(512, |cases| cases.parse().expect("ANABRANCH_CASES is a number"));
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

/// Reproducible noise (splitmix64).
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// In [0, 1).
    pub(crate) fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u32 << 24) as f32
    }

    /// About a standard normal: twelve uniforms.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

/// Elements on either side of a guarded buffer.
const GUARD: usize = 256;

/// Device memory full of a poison, with more of it on both sides: what an operation writes must be all of the middle and
/// nothing else.
pub(crate) struct Guarded<T> {
    slice: CudaSlice<T>,
    poison: T,
    start: usize,
    shape: Shape,
}

impl<T: Element + PartialEq> Guarded<T> {
    /// The middle starts `offset` elements past an aligned address.
    pub(crate) fn new(stream: &Stream, shape: impl Into<Shape>, poison: T, offset: usize) -> Self {
        let shape = shape.into();
        let slice = stream.cudarc().clone_htod(&vec![poison; shape.len() + 2 * GUARD + offset]).unwrap();
        Self { slice, poison, start: GUARD + offset, shape }
    }

    /// With these values in the middle.
    pub(crate) fn holding(stream: &Stream, shape: impl Into<Shape>, values: &[T], poison: T, offset: usize) -> Self {
        let mut buffer = Self::new(stream, shape, poison, offset);
        buffer.fill(stream, values);
        buffer
    }

    pub(crate) fn fill(&mut self, stream: &Stream, values: &[T]) {
        assert_eq!(values.len(), self.shape.len());
        if !values.is_empty() {
            let mut middle = self.slice.slice_mut(self.start..self.start + values.len());
            stream.cudarc().memcpy_htod(values, &mut middle).unwrap();
        }
    }

    pub(crate) fn view(&self) -> View<'_, T> {
        View::new(self.slice.slice(self.start..self.start + self.shape.len()), self.shape).unwrap()
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_, T> {
        ViewMut::new(self.slice.slice_mut(self.start..self.start + self.shape.len()), self.shape).unwrap()
    }

    /// The middle, once both sides are found untouched.
    pub(crate) fn read(&self, stream: &Stream) -> Vec<T> {
        let all = stream.cudarc().clone_dtoh(&self.slice).unwrap();
        stream.synchronize().unwrap();
        let (before, rest) = all.split_at(self.start);
        let (middle, after) = rest.split_at(self.shape.len());
        let untouched = |side: &[T]| side.iter().all(|value| *value == self.poison);
        assert!(untouched(before), "written before the start of a buffer of shape {}", self.shape);
        assert!(untouched(after), "written past the end of a buffer of shape {}", self.shape);
        middle.to_vec()
    }
}
