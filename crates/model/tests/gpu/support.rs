//! What the tests share: the GPU, and golden models.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use anabranch_model::{
    Backend, Batch, Config, Cuda, Error, GivenRouting, Model, Observer, Segment, TensorFile, TopkIds,
    config::FeedForward,
};

/// Runs a test on a GPU. Without one it passes with a note, or fails under `ANABRANCH_REQUIRE_GPU=1`.
pub(crate) fn on_gpu(test: impl FnOnce(&dyn Fn() -> Cuda)) {
    match Cuda::open(0) {
        Ok(_) => test(&|| Cuda::open(0).unwrap()),
        Err(Error::Operation(error @ anabranch::Error::NoGpu { .. }))
            if env::var("ANABRANCH_REQUIRE_GPU").as_deref() != Ok("1") =>
        {
            println!("skipped: {error}");
        }
        Err(error) => panic!("{error}"),
    }
}

/// A golden model: in the checkout, or where `ANABRANCH_GOLDEN` says on a machine that has none.
pub(crate) fn folder(name: &str) -> PathBuf {
    let elsewhere = env::var_os("ANABRANCH_GOLDEN").filter(|path| !path.is_empty()).map(PathBuf::from);
    let golden = elsewhere.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden"));
    golden.join("models").join(name)
}

/// The names of all golden models, sorted.
pub(crate) fn golden() -> Vec<String> {
    let folders = fs::read_dir(folder("")).unwrap();
    let mut names: Vec<String> = folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert!(!names.is_empty());
    names
}

/// What Transformers computed from a golden model, in float32.
pub(crate) struct Expected(TensorFile);

impl Expected {
    pub(crate) fn open(name: &str) -> Self {
        Self(TensorFile::open(&folder(name).join("expected.safetensors")).unwrap())
    }

    pub(crate) fn floats(&self, name: &str) -> Vec<f32> {
        self.0.get(name).unwrap().to_f32().unwrap()
    }

    pub(crate) fn tokens(&self, name: &str) -> Vec<u32> {
        self.0.get(name).unwrap().to_i64().unwrap().iter().map(|id| *id as u32).collect()
    }

    /// The experts of every layer that has some.
    pub(crate) fn routing(&self, config: &Config) -> GivenRouting {
        let topk = config.moe.as_ref().map_or(0, |moe| moe.routing.topk());
        let routes = |layer: &usize| config.layers[*layer] == FeedForward::Moe;
        let ids = |layer: usize| self.0.get(&format!("topk.{layer}")).unwrap().to_i64().unwrap();
        (0..config.layers.len())
            .filter(routes)
            .map(|layer| (layer, TopkIds { ids: ids(layer).iter().map(|id| *id as i32).collect(), topk }))
            .collect()
    }
}

pub(crate) fn load<B: Backend>(name: &str, backend: B) -> Model<B> {
    Model::load(&folder(name), backend, &mut |_, _| {}).unwrap()
}

/// The tables of two sequences of one block each.
pub(crate) const TABLES: [[u32; 1]; 2] = [[1], [0]];

/// The golden prompts side by side: two of one length.
pub(crate) fn halves(ids: &[u32]) -> [Segment<'static>; 2] {
    TABLES.each_ref().map(|blocks| Segment { blocks, position: 0, len: ids.len() / 2 })
}

/// The logits of all tokens of one pass from nothing.
pub(crate) fn logits<B: Backend>(
    model: &Model<B>,
    ids: &[u32],
    segments: &[Segment<'_>],
    observer: Option<&mut dyn Observer>,
    routing: &GivenRouting,
) -> Vec<f32> {
    let mut cache = model.cache(TABLES.len()).unwrap();
    let hidden = model.forward_with(&Batch { ids, segments }, &mut cache, observer, routing).unwrap();
    model.logits(&hidden, &(0..ids.len()).collect::<Vec<_>>()).unwrap()
}

/// `||got - expected|| / ||expected||`; not a number where `got` is not one.
pub(crate) fn relative_error(got: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
    let off = square(&mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (off / square(&mut expected.iter().map(|value| f64::from(*value)))).sqrt()
}

/// Asserts that it is within the bound, which nothing that is not a number is.
pub(crate) fn assert_close(what: &str, got: &[f32], expected: &[f32], bound: f64) {
    let off = relative_error(got, expected);
    println!("{what}: relative error {off:.2e} of {bound:.1e}");
    assert!(off <= bound, "{what}: relative error {off:e} is above {bound:e}");
}
