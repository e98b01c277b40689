//! One token through all layers of a model, in one launch.

use half::bf16;

use super::{
    Arch, RopeTable, Stream, Tensor, View, ViewMut,
    checks::size,
    launch::{Launch, Pointer, launched},
    router::rule,
    sys,
};
use crate::{Error, Result, Rope, RopeLayout, Routing, reference::AttentionShape};

const OPERATION: &str = "decode_step";

/// What all layers of a model share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecodeShape {
    /// Number of layers.
    pub num_layers: usize,
    /// d, a multiple of 8.
    pub hidden_size: usize,
    /// Of the norms of the residual stream.
    pub norm_eps: f32,
    /// Heads as they attend; of latent attention one key head of the latent's width and the rotated part.
    pub attention: AttentionShape,
    /// Latent attention: elements of a projected query head, and of a head's output.
    pub latent: Option<[usize; 2]>,
    /// Of the norms of heads, or of the latent.
    pub head_norm_eps: f32,
    /// The first rotated element of a head.
    pub rotary_first: usize,
    /// Of layers with experts, if there are any.
    pub routing: Option<Routing>,
    /// S: experts that every token visits, with weight one.
    pub num_shared: usize,
    /// n of an expert.
    pub intermediate_size: usize,
    /// n of a layer without experts; 0 if there is none.
    pub dense_size: usize,
}

/// A layer's weights and cache.
#[derive(Debug)]
pub struct DecodeLayer<'a> {
    /// `[d]`.
    pub attention_norm: View<'a, f32>,
    /// From the norm to heads.
    pub projections: DecodeProjections<'a>,
    /// `[d, H value_dim]`; latent: `[d, H o_dim]`.
    pub output: View<'a, bf16>,
    /// `[rows, G key_dim]`.
    pub k_cache: ViewMut<'a, bf16>,
    /// `[rows, G value_dim]`; latent: of no width.
    pub v_cache: ViewMut<'a, bf16>,
    /// `[d]`.
    pub feed_forward_norm: View<'a, f32>,
    /// The router of a layer with experts.
    pub router: Option<DecodeRouter<'a>>,
    /// `[E + S, 2 n, d]`, as [`MoeLayer`](super::MoeLayer) has it, or without experts `[2 n, d]`.
    pub gate_up: View<'a, bf16>,
    /// `[E + S, d, n]`, or `[d, n]`.
    pub down: View<'a, bf16>,
}

/// What makes queries, keys and values.
#[derive(Debug)]
pub enum DecodeProjections<'a> {
    /// Of heads that are projected as they are.
    Grouped {
        /// `[(H + 2 G) key_dim, d]`: queries, keys, values.
        qkv: View<'a, bf16>,
        /// `[key_dim]` each: norms of every head of queries and of keys.
        norms: Option<[View<'a, f32>; 2]>,
    },
    /// Of DeepSeek-V2's latent attention, absorbed.
    Latent {
        /// `[H q_dim, d]`.
        q: View<'a, bf16>,
        /// `[key_dim, d]`.
        kv: View<'a, bf16>,
        /// `[value_dim]`.
        kv_norm: View<'a, f32>,
        /// `[H, key_dim, q_dim]`.
        absorb: View<'a, bf16>,
        /// `[H, o_dim, value_dim]`.
        expand: View<'a, bf16>,
    },
}

/// A layer's router.
#[derive(Debug)]
pub struct DecodeRouter<'a> {
    /// `[E, d]`.
    pub gate: View<'a, bf16>,
    /// `[E]`: steers the choice but never the weights.
    pub selection_bias: Option<View<'a, f32>>,
}

/// The token's place in its sequence, on the GPU; what is out of bounds there is not followed.
#[derive(Debug)]
pub struct DecodeSequence<'a> {
    /// `[1]`: its position.
    pub position: View<'a, i32>,
    /// `[1]`: its row of every layer's cache. Outside of it, nothing is written.
    pub cache_row: View<'a, i32>,
    /// `[1]`: keys of the sequence, the token's own included.
    pub kv_length: View<'a, u32>,
    /// `[1]`: where its table begins.
    pub table_start: View<'a, u32>,
    /// The sequence's blocks from there on.
    pub block_table: View<'a, u32>,
    /// Rows of a block: a power of two, at least 64.
    pub block_size: usize,
}

/// A model's decode step on one stream.
///
/// # Example
/// ```no_run
/// # fn run(
/// #     stream: &anabranch::cuda::Stream,
/// #     shape: anabranch::cuda::DecodeShape,
/// #     rope: &anabranch::cuda::RopeTable,
/// #     layers: &mut [anabranch::cuda::DecodeLayer<'_>],
/// #     sequence: &anabranch::cuda::DecodeSequence<'_>,
/// #     x: &mut anabranch::cuda::ViewMut<'_, half::bf16>,
/// # ) -> anabranch::Result<()> {
/// use anabranch::cuda::{Arch, DecodeStep};
///
/// if let Some(mut step) = DecodeStep::new(stream, &shape, rope.rope(), Arch::Auto)? {
///     step.run_into(stream, rope, layers, sequence, x)?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DecodeStep {
    shape: DecodeShape,
    /// What blocks tell one another; zero before the first launch.
    words: Tensor<u8>,
}

impl DecodeStep {
    /// A step of models of this shape on the stream's GPU, if there is a kernel for it: compute capability 9.0, attention of at most 16
    /// query heads a key head, of 16 to 128 elements (latent: 512 and 64), d up to 4,096, up to 256 experts and 96 layers, no biases.
    /// There is none for [`Arch::Sm80`], nor for [`Arch::Auto`] where `ANABRANCH_ARCH` says so.
    ///
    /// # Errors
    /// [`Error::Setting`] if a size is out of range or `ANABRANCH_ARCH` names no path, [`Error::OutOfMemory`], or [`Error::Launch`] if the router's rule contradicts itself.
    pub fn new(stream: &Stream, shape: &DecodeShape, rope: &Rope, arch: Arch) -> Result<Option<Self>> {
        if arch.named()? == Arch::Sm80 {
            return Ok(None);
        }
        Launch::bind(OPERATION, stream.device())?;
        let described = describe(shape, rope)?;
        let (mut takes, mut bytes) = (0, 0);
        // SAFETY: all three point to live values of their types.
        let status = unsafe { sys::anabranch_decode_step_takes(&raw const described, &raw mut takes, &raw mut bytes) };
        launched(OPERATION, status)?;
        if takes == 0 {
            return Ok(None);
        }
        Ok(Some(Self { shape: *shape, words: stream.zeros([bytes as usize])? }))
    }

    /// Bytes of the step's own memory.
    pub fn workspace_bytes(&self) -> usize {
        self.words.shape().len()
    }

    /// `x += attention(norm(x)); x += feed_forward(norm(x))` through all layers, in one launch. `x` is `[1, d]`, in place; the token's
    /// key and value go into the caches. Matrices, caches and what is multiplied are bf16; sums and the residual stream between layers
    /// are float32, and an expert's weight is applied to its h before that is rounded. The same input gives the same bits, launched or
    /// replayed. The launch is cooperative: it waits until the whole GPU is free, and nothing else runs beside it.
    ///
    /// Reads every active weight once. A token of Qwen3-30B-A3B, 48 layers of 113 MB and the LM head after them, takes 2.6 ms on an H200, 1.3
    /// at the speed of its memory; of DeepSeek-V2-Lite 2.1 and 1.1 (docs/decode.md). Layers that read much more, and long contexts, are
    /// faster operation by operation.
    ///
    /// # Errors
    /// [`Error::Shape`] if a shape does not fit, [`Error::Setting`] if there is another number of layers than the step's or the rotation
    /// is another, [`Error::Place`] if a tensor is elsewhere, [`Error::Launch`] if a buffer does not start on 16 bytes, layers
    /// disagree on having a selection bias, or CUDA refuses the launch.
    pub fn run_into(
        &mut self,
        stream: &Stream,
        rope: &RopeTable,
        layers: &mut [DecodeLayer<'_>],
        sequence: &DecodeSequence<'_>,
        x: &mut ViewMut<'_, bf16>,
    ) -> Result<()> {
        let shape = self.shape;
        let launch = Launch::begin(OPERATION, stream)?;
        if layers.len() != shape.num_layers {
            return Err(Error::Setting {
                operation: OPERATION,
                setting: "layers",
                expected: shape.num_layers.to_string(),
                got: layers.len().to_string(),
            });
        }
        let mut guards = Guards { launch, shape, bf16: Vec::new(), f32: Vec::new(), cache_rows: None };
        let mut described = Vec::with_capacity(layers.len());
        for layer in layers {
            described.push(guards.layer(layer)?);
        }
        let cache_rows = guards.cache_rows.unwrap_or(0);
        let frequencies = rope.frequencies();
        let frequencies = launch.read("frequencies", &frequencies, [rope.rope().rotary_dim() / 2])?;
        let position = launch.read("position", &sequence.position, [1])?;
        let cache_row = launch.read("cache_row", &sequence.cache_row, [1])?;
        let kv_length = launch.read("kv_length", &sequence.kv_length, [1])?;
        let table_start = launch.read("table_start", &sequence.table_start, [1])?;
        let table_len = sequence.block_table.shape().len();
        let block_table = launch.read("block_table", &sequence.block_table, [table_len])?;
        let x = launch.write("x", x, [1, shape.hidden_size])?;
        let mut words = self.words.view_mut();
        let workspace_bytes = words.shape().len();
        let workspace = launch.workspace(&mut words, workspace_bytes)?;
        let params = sys::AnabranchDecodeStepParams {
            shape: describe(&shape, rope.rope())?,
            layers: described.as_ptr(),
            frequencies: frequencies.pointer,
            position: position.pointer,
            cache_row: cache_row.pointer,
            kv_length: kv_length.pointer,
            table_start: table_start.pointer,
            block_table: block_table.pointer,
            table_len: table_len as u64,
            block_size: size(OPERATION, "block_size", sequence.block_size)?,
            cache_rows: cache_rows as u64,
            x: x.pointer.cast(),
            workspace: workspace.pointer.cast(),
            workspace_bytes: workspace_bytes as u64,
        };
        // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the stream's
        // GPU; what is written is borrowed mutably; the kernel keeps to these shapes whatever the numbers on the GPU are; the
        // words were zero at first and nobody else writes them; the guards in scope outlive the launch.
        launch.end(unsafe { sys::anabranch_decode_step(&raw const params, launch.raw_stream()) })
    }
}

/// Pointers of all layers, whose memory is in use until after the launch.
struct Guards<'a> {
    launch: Launch<'a>,
    shape: DecodeShape,
    bf16: Vec<Pointer<'a, bf16>>,
    f32: Vec<Pointer<'a, f32>>,
    /// Of every layer's cache.
    cache_rows: Option<usize>,
}

impl<'a> Guards<'a> {
    fn matrix<const N: usize>(
        &mut self,
        argument: &'static str,
        view: &'a View<'_, bf16>,
        shape: [usize; N],
    ) -> Result<*const std::ffi::c_void>
    where
        super::Shape: From<[usize; N]>,
    {
        self.bf16.push(self.launch.read(argument, view, shape)?);
        Ok(self.bf16[self.bf16.len() - 1].pointer.cast())
    }

    fn vector(&mut self, argument: &'static str, view: &'a View<'_, f32>, len: usize) -> Result<*const f32> {
        self.f32.push(self.launch.read(argument, view, [len])?);
        Ok(self.f32[self.f32.len() - 1].pointer)
    }

    fn cache(
        &mut self,
        argument: &'static str,
        view: &'a mut ViewMut<'_, bf16>,
        width: usize,
    ) -> Result<*mut std::ffi::c_void> {
        let rows = *self.cache_rows.get_or_insert_with(|| view.shape().sizes()[0]);
        self.bf16.push(self.launch.write(argument, view, [rows, width])?);
        Ok(self.bf16[self.bf16.len() - 1].pointer.cast())
    }

    fn layer(&mut self, layer: &'a mut DecodeLayer<'_>) -> Result<sys::AnabranchDecodeLayer> {
        let null = std::ptr::null();
        let DecodeShape { hidden_size: d, attention, .. } = self.shape;
        let AttentionShape { num_heads: heads, num_kv_heads, key_dim, value_dim, .. } = attention;
        let mut described = sys::AnabranchDecodeLayer {
            attention_norm: self.vector("attention_norm", &layer.attention_norm, d)?,
            q: null,
            kv: null,
            q_norm: std::ptr::null(),
            k_norm: std::ptr::null(),
            absorb: null,
            expand: null,
            output: null,
            k_cache: self.cache("k_cache", &mut layer.k_cache, num_kv_heads * key_dim)?,
            v_cache: std::ptr::null_mut(),
            feed_forward_norm: self.vector("feed_forward_norm", &layer.feed_forward_norm, d)?,
            gate: null,
            selection_bias: std::ptr::null(),
            gate_up: null,
            down: null,
        };
        let mut o_dim = value_dim;
        match (&layer.projections, self.shape.latent) {
            (DecodeProjections::Grouped { qkv, norms }, None) => {
                described.q = self.matrix("qkv", qkv, [(heads + 2 * num_kv_heads) * key_dim, d])?;
                if let Some([q, k]) = norms {
                    described.q_norm = self.vector("norm of queries", q, key_dim)?;
                    described.k_norm = self.vector("norm of keys", k, key_dim)?;
                }
                described.v_cache = self.cache("v_cache", &mut layer.v_cache, num_kv_heads * value_dim)?;
            }
            (DecodeProjections::Latent { q, kv, kv_norm, absorb, expand }, Some([q_dim, out])) => {
                o_dim = out;
                described.q = self.matrix("q", q, [heads * q_dim, d])?;
                described.kv = self.matrix("kv", kv, [key_dim, d])?;
                described.k_norm = self.vector("kv_norm", kv_norm, value_dim)?;
                described.absorb = self.matrix("absorb", absorb, [heads, key_dim, q_dim])?;
                described.expand = self.matrix("expand", expand, [heads, out, value_dim])?;
            }
            (_, latent) => {
                return Err(Error::Setting {
                    operation: OPERATION,
                    setting: "projections",
                    expected: if latent.is_some() { "latent ones" } else { "grouped ones" }.to_owned(),
                    got: "the others".to_owned(),
                });
            }
        }
        described.output = self.matrix("output", &layer.output, [d, heads * o_dim])?;
        match (&layer.router, self.shape.routing) {
            (Some(router), Some(routing)) => {
                let (experts, n) = (routing.num_experts(), self.shape.intermediate_size);
                let all = experts + self.shape.num_shared;
                described.gate = self.matrix("gate", &router.gate, [experts, d])?;
                if let Some(bias) = &router.selection_bias {
                    described.selection_bias = self.vector("selection_bias", bias, experts)?;
                }
                described.gate_up = self.matrix("gate_up", &layer.gate_up, [all, 2 * n, d])?;
                described.down = self.matrix("down", &layer.down, [all, d, n])?;
            }
            (None, _) => {
                let n = self.shape.dense_size;
                described.gate_up = self.matrix("gate_up", &layer.gate_up, [2 * n, d])?;
                described.down = self.matrix("down", &layer.down, [d, n])?;
            }
            (Some(_), None) => {
                return Err(Error::Setting {
                    operation: OPERATION,
                    setting: "router",
                    expected: "none in a model without a routing".to_owned(),
                    got: "one".to_owned(),
                });
            }
        }
        Ok(described)
    }
}

fn describe(shape: &DecodeShape, rope: &Rope) -> Result<sys::AnabranchDecodeShape> {
    let AttentionShape { num_heads, num_kv_heads, key_dim, value_dim, scale } = shape.attention;
    let [q_dim, o_dim] = shape.latent.unwrap_or([0, 0]);
    let none = sys::AnabranchRouting {
        num_experts: 0,
        topk: 0,
        score: sys::AnabranchScore::ANABRANCH_SCORE_SOFTMAX,
        renormalize: sys::AnabranchRenormalize::ANABRANCH_RENORMALIZE_NONE,
        scale: 1.0,
        n_group: 0,
        topk_group: 0,
        group_score: sys::AnabranchGroupScore::ANABRANCH_GROUP_SCORE_MAX,
        adaptive: sys::AnabranchAdaptive::ANABRANCH_ADAPTIVE_FIXED,
        expert_capacity: 0,
    };
    let size = |setting, value| size(OPERATION, setting, value);
    Ok(sys::AnabranchDecodeShape {
        num_layers: size("num_layers", shape.num_layers)?,
        hidden_size: size("hidden_size", shape.hidden_size)?,
        norm_eps: shape.norm_eps,
        num_heads: size("num_heads", num_heads)?,
        num_kv_heads: size("num_kv_heads", num_kv_heads)?,
        key_dim: size("key_dim", key_dim)?,
        value_dim: size("value_dim", value_dim)?,
        q_dim: size("q_dim", q_dim)?,
        o_dim: size("o_dim", o_dim)?,
        scale,
        head_norm_eps: shape.head_norm_eps,
        layout: match rope.layout() {
            RopeLayout::Half => sys::AnabranchRopeLayout::ANABRANCH_ROPE_LAYOUT_HALF,
            RopeLayout::Interleaved => sys::AnabranchRopeLayout::ANABRANCH_ROPE_LAYOUT_INTERLEAVED,
        },
        rotary_dim: size("rotary_dim", rope.rotary_dim())?,
        rotary_first: size("rotary_first", shape.rotary_first)?,
        attention_factor: rope.attention_factor() as f32,
        routing: shape.routing.map_or(none, |routing| rule(&routing, 1)),
        num_shared: size("num_shared", shape.num_shared)?,
        intermediate_size: size("intermediate_size", shape.intermediate_size)?,
        dense_size: size("dense_size", shape.dense_size)?,
    })
}
