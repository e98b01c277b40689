//! A whole MoE layer in one call: from router logits, or a routing made elsewhere, to the layer's output.

mod block;

use std::{env, fmt, str::FromStr};

use half::bf16;

use super::{
    Device, Stream, Tensor, View, ViewMut,
    checks::{matrix, size},
    grouped_gemm::check_width,
    launch::{Launch, Pointer, launched},
    router::rule,
    sys,
};
use crate::{Adaptive, Error, MAX_EXPERTS, MAX_TOPK, Result, Routing};

pub use block::MoeBlock;

const OPERATION: &str = "moe_layer";

/// The environment variable that names the path for [`Arch::Auto`].
const VARIABLE: &str = "ANABRANCH_ARCH";

/// Which code path runs a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Arch {
    /// The newest that the GPU and the shape allow, or what the environment variable `ANABRANCH_ARCH` names.
    #[default]
    Auto,
    /// `mma.sync`: every GPU of compute capability 8.0 or newer, every shape.
    Sm80,
    /// TMA and `wgmma`: compute capability 9.0.
    Sm90,
}

impl FromStr for Arch {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "sm80" => Ok(Self::Sm80),
            "sm90" => Ok(Self::Sm90),
            _ => Err(Error::Setting {
                operation: OPERATION,
                setting: "arch",
                expected: "auto, sm80 or sm90".to_owned(),
                got: text.to_owned(),
            }),
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Sm80 => "sm80",
            Self::Sm90 => "sm90",
        })
    }
}

impl Arch {
    /// What the environment asks for where the caller leaves the choice.
    fn resolve(self, variable: Option<&str>) -> Result<Self> {
        match variable {
            Some(text) if self == Self::Auto && !text.is_empty() => text.parse().map_err(|_| Error::Setting {
                operation: OPERATION,
                setting: VARIABLE,
                expected: "auto, sm80 or sm90".to_owned(),
                got: text.to_owned(),
            }),
            _ => Ok(self),
        }
    }

    /// What the environment makes of it.
    pub(super) fn named(self) -> Result<Self> {
        let variable = env::var_os(VARIABLE).map(|value| value.to_string_lossy().into_owned());
        self.resolve(variable.as_deref())
    }

    fn to_sys(self) -> sys::AnabranchArch {
        match self {
            Self::Auto => sys::AnabranchArch::ANABRANCH_ARCH_AUTO,
            Self::Sm80 => sys::AnabranchArch::ANABRANCH_ARCH_SM80,
            Self::Sm90 => sys::AnabranchArch::ANABRANCH_ARCH_SM90,
        }
    }

    fn of_sys(arch: sys::AnabranchArch) -> Self {
        if arch == sys::AnabranchArch::ANABRANCH_ARCH_SM90 { Self::Sm90 } else { Self::Sm80 }
    }
}

/// A layer of SwiGLU experts, bf16.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeShape {
    /// The router's rule: E routed experts, K of them a token.
    pub routing: Routing,
    /// d, a multiple of 8.
    pub hidden_size: usize,
    /// n, the width of an expert, a multiple of 8.
    pub intermediate_size: usize,
    /// S: experts of the same width that every token visits. A shared expert of width `m n` is m of them. `E + S` is at
    /// most 1,024, `K + S` at most 32.
    pub num_shared: usize,
}

impl MoeShape {
    /// Every width within what the kernels take.
    fn check(&self) -> Result<()> {
        check_width(OPERATION, "hidden_size", self.hidden_size)?;
        check_width(OPERATION, "intermediate_size", self.intermediate_size)?;
        let most = (MAX_EXPERTS - self.routing.num_experts()).min(MAX_TOPK - self.routing.topk());
        if self.num_shared <= most {
            return Ok(());
        }
        Err(Error::Setting {
            operation: OPERATION,
            setting: "num_shared",
            expected: format!(
                "at most {most} beside {} of {} routed experts",
                self.routing.topk(),
                self.routing.num_experts()
            ),
            got: self.num_shared.to_string(),
        })
    }

    fn to_sys(self, num_tokens: usize, arch: Arch) -> Result<sys::AnabranchMoeShape> {
        Ok(sys::AnabranchMoeShape {
            routing: rule(&self.routing, num_tokens),
            num_shared: size(OPERATION, "num_shared", self.num_shared)?,
            hidden_size: size(OPERATION, "hidden_size", self.hidden_size)?,
            intermediate_size: size(OPERATION, "intermediate_size", self.intermediate_size)?,
            arch: arch.to_sys(),
        })
    }
}

/// Where a token's experts and their weights come from.
#[derive(Debug)]
pub enum MoeRouting<'a> {
    /// The layer's own router judges.
    Logits {
        /// `[T, E]`: the gate product, with the gate's bias already added.
        logits: View<'a, f32>,
        /// `[E]`: steers the choice but never the weights (`e_score_correction_bias`).
        selection_bias: Option<View<'a, f32>>,
    },
    /// Made elsewhere.
    Given {
        /// `[T, K]`; an id that is no routed expert's, such as -1, adds nothing.
        topk_ids: View<'a, i32>,
        /// `[T, K]`, used as they are.
        topk_weights: View<'a, f32>,
    },
}

/// What a layer reads.
#[derive(Debug)]
pub struct MoeInput<'a> {
    /// `[T, d]`.
    pub x: View<'a, bf16>,
    /// Who visits whom.
    pub routing: MoeRouting<'a>,
    /// `[T]`: logits of the shared experts' gate, whose sigmoid scales their sum (Qwen2-MoE's `shared_expert_gate`).
    pub shared_gate: Option<View<'a, f32>>,
    /// `[E + S, 2 n, d]`: gate rows, then up rows of every expert, shared ones last (`gate_up_proj`).
    pub gate_up: View<'a, bf16>,
    /// `[E + S, d, n]` (`down_proj`).
    pub down: View<'a, bf16>,
}

/// What a layer writes. Nothing that was there is read.
#[derive(Debug)]
pub struct MoeBuffers<'a> {
    /// `[T, d]`.
    pub out: ViewMut<'a, bf16>,
    /// Who visited whom, for who wants to know; only with [`MoeRouting::Logits`].
    pub topk: Option<TopkBuffers<'a>>,
}

/// What a layer's router writes.
#[derive(Debug)]
pub struct TopkBuffers<'a> {
    /// `[T, K]`, descending by selection score; -1 where a slot is unused or the token was dropped.
    pub ids: ViewMut<'a, i32>,
    /// `[T, K]`; 0 where the id is -1.
    pub weights: ViewMut<'a, f32>,
}

impl<'a> From<ViewMut<'a, bf16>> for MoeBuffers<'a> {
    /// Writes the output alone.
    fn from(out: ViewMut<'a, bf16>) -> Self {
        Self { out, topk: None }
    }
}

/// A mixture-of-experts layer, planned once for a shape and a GPU and run many times.
///
/// ```text
/// out[t] = sum_k topk_weights[t, k] E_k(x[t]) + g[t] sum_s S_s(x[t])      E(x) = (silu(x W_gate^T) * (x W_up^T)) W_down^T
/// ```
///
/// as [`reference::MoeLayer`](crate::reference::MoeLayer) specifies, products summed in float32, `h` between the two
/// products in bf16. It costs `6 T (K + S) d n` FLOP or one read of the weights of all experts hit, whichever takes
/// longer. The same call gives the same bits, every time.
///
/// ```no_run
/// use anabranch::{Renormalize, Routing, cuda::{Arch, Device, MoeInput, MoeLayer, MoeRouting, MoeShape}};
/// use half::bf16;
/// let stream = Device::open(0)?.new_stream()?;
/// let routing = Routing::builder(128, 8).renormalize(Renormalize::Sum).build()?; // Qwen3-30B-A3B
/// let shape = MoeShape { routing, hidden_size: 2048, intermediate_size: 768, num_shared: 0 };
/// let layer = MoeLayer::plan(stream.device(), &shape, 4096, Arch::Auto)?;
/// println!("{}", layer.describe());
///
/// let (x, logits) = (stream.zeros::<bf16>([64, 2048])?, stream.zeros::<f32>([64, 128])?);
/// let (gate_up, down) = (stream.zeros::<bf16>([128, 1536, 2048])?, stream.zeros::<bf16>([128, 2048, 768])?);
/// let input = MoeInput {
///     x: x.view(),
///     routing: MoeRouting::Logits { logits: logits.view(), selection_bias: None },
///     shared_gate: None,
///     gate_up: gate_up.view(),
///     down: down.view(),
/// };
/// let out = layer.forward(&stream, &input)?; // [64, 2048]
/// # Ok::<(), anabranch::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct MoeLayer {
    device: Device,
    shape: MoeShape,
    most_tokens: usize,
    arch: Arch,
    plan: MoePlan,
}

impl MoeLayer {
    /// Plans for up to `most_tokens` tokens a call. Nothing is launched or allocated. With [`Arch::Auto`] the
    /// environment variable `ANABRANCH_ARCH` (`auto`, `sm80` or `sm90`) is read.
    ///
    /// # Errors
    /// [`Error::Setting`] if a size is out of range, the GPU or the shape does not allow `arch`, or the environment
    /// variable names no path; [`Error::Launch`] if the kernels refuse the shape for another reason, such as 2^31 pairs
    /// or more.
    pub fn plan(device: &Device, shape: &MoeShape, most_tokens: usize, arch: Arch) -> Result<Self> {
        let arch = arch.named()?;
        shape.check()?;
        let plan = MoePlan::of(device, shape, most_tokens, arch)?;
        Ok(Self { device: device.clone(), shape: *shape, most_tokens, arch, plan })
    }

    /// The layer's shape.
    pub fn shape(&self) -> &MoeShape {
        &self.shape
    }

    /// Most tokens of a call.
    pub fn most_tokens(&self) -> usize {
        self.most_tokens
    }

    /// Bytes of workspace that [`MoeLayer::forward_into`] needs, whatever the number of tokens.
    pub fn workspace_bytes(&self) -> usize {
        self.plan.workspace_bytes
    }

    /// What was chosen for the most tokens, and what bounds it.
    pub fn describe(&self) -> MoePlan {
        self.plan
    }

    /// What is chosen for a call of fewer tokens.
    ///
    /// # Errors
    /// [`Error::Setting`] if there are more than was planned for.
    pub fn describe_for(&self, num_tokens: usize) -> Result<MoePlan> {
        self.check_tokens(num_tokens)?;
        MoePlan::of(&self.device, &self.shape, num_tokens, self.arch)
    }

    /// Runs the layer on the T tokens of `input`, at most as many as were planned for. The workspace starts on 256
    /// bytes; what it holds before does not matter, and nothing is kept there from one call to the next. Nothing waits
    /// and nothing is allocated: the call can be captured in a CUDA graph and replayed with whatever logits or routing
    /// then lie in the buffers.
    ///
    /// # Errors
    /// [`Error::Shape`] if a shape does not fit; [`Error::Setting`] if there are more tokens than was planned for, a
    /// shared gate without shared experts, a routing that needs a complexity and is not given, or a routing is both
    /// given and asked for; [`Error::Place`] if a tensor is elsewhere or the plan was made for another GPU;
    /// [`Error::Launch`] if a row does not start on 16 bytes or CUDA refuses the launch.
    pub fn forward_into(
        &self,
        stream: &Stream,
        input: &MoeInput<'_>,
        workspace: &mut ViewMut<'_, u8>,
        output: &mut MoeBuffers<'_>,
    ) -> Result<()> {
        let MoeShape { routing, hidden_size, intermediate_size, num_shared } = self.shape;
        let (experts, topk) = (routing.num_experts(), routing.topk());
        let [num_tokens, _] = matrix(OPERATION, "x", input.x.shape())?;
        self.check_call(stream, num_tokens, input, output.topk.is_some())?;

        let launch = Launch::begin(OPERATION, stream)?;
        let x = launch.read("x", &input.x, [num_tokens, hidden_size])?;
        let (logits, selection_bias, ids, weights) = match (&input.routing, &mut output.topk) {
            (MoeRouting::Logits { logits, selection_bias }, topk_out) => {
                let logits = launch.read("logits", logits, [num_tokens, experts])?;
                let bias = match selection_bias {
                    Some(bias) => launch.read("selection_bias", bias, [experts])?,
                    None => Pointer::null(),
                };
                let (ids, weights) = match topk_out {
                    Some(out) => (
                        launch.write("topk ids", &mut out.ids, [num_tokens, topk])?,
                        launch.write("topk weights", &mut out.weights, [num_tokens, topk])?,
                    ),
                    None => (Pointer::null(), Pointer::null()),
                };
                (logits, bias, ids, weights)
            }
            (MoeRouting::Given { topk_ids, topk_weights }, _) => (
                Pointer::null(),
                Pointer::null(),
                launch.read("topk_ids", topk_ids, [num_tokens, topk])?,
                launch.read("topk_weights", topk_weights, [num_tokens, topk])?,
            ),
        };
        let shared_gate = match &input.shared_gate {
            Some(gate) => launch.read("shared_gate", gate, [num_tokens])?,
            None => Pointer::null(),
        };
        let all = experts + num_shared;
        let gate_up = launch.read("gate_up", &input.gate_up, [all, 2 * intermediate_size, hidden_size])?;
        let down = launch.read("down", &input.down, [all, hidden_size, intermediate_size])?;
        let out = launch.write("out", &mut output.out, [num_tokens, hidden_size])?;
        let workspace_bytes = workspace.shape().len();
        let workspace = launch.workspace(workspace, self.plan.workspace_bytes)?;
        let params = sys::AnabranchMoeLayerParams {
            shape: self.shape.to_sys(num_tokens, self.arch)?,
            num_tokens: num_tokens as u64,
            x: x.pointer.cast(),
            logits: logits.pointer,
            selection_bias: selection_bias.pointer,
            shared_gate: shared_gate.pointer,
            gate_up: gate_up.pointer.cast(),
            down: down.pointer.cast(),
            topk_ids: ids.pointer,
            topk_weights: weights.pointer,
            out: out.pointer.cast(),
            workspace: workspace.pointer.cast(),
            workspace_bytes: workspace_bytes as u64,
        };
        // SAFETY: the pointers are of device memory of the shapes that the header asks for, checked by `launch`, on the
        // stream's GPU; what is written is borrowed mutably, and ids and weights that are only borrowed are written
        // where logits are given alone; the kernels follow no id that is not an expert's; the guards in scope outlive
        // the launch.
        launch.end(unsafe { sys::anabranch_moe_layer(&raw const params, launch.raw_stream()) })
    }

    /// Runs the layer into new memory, `[T, d]`: [`MoeLayer::forward_into`] with allocations.
    ///
    /// # Errors
    /// Those of [`MoeLayer::forward_into`], and [`Error::OutOfMemory`].
    pub fn forward(&self, stream: &Stream, input: &MoeInput<'_>) -> Result<Tensor<bf16>> {
        let [num_tokens, hidden_size] = matrix(OPERATION, "x", input.x.shape())?;
        let mut workspace = self.workspace(stream)?;
        let mut out = Tensor::from_parts(stream.alloc(num_tokens * hidden_size)?, [num_tokens, hidden_size].into());
        self.forward_into(stream, input, &mut workspace.view_mut(), &mut out.view_mut().into())?;
        Ok(out)
    }

    /// New workspace, of [`MoeLayer::workspace_bytes`].
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or [`Error::Driver`] for anything else.
    pub fn workspace(&self, stream: &Stream) -> Result<Tensor<u8>> {
        Ok(Tensor::from_parts(stream.alloc(self.plan.workspace_bytes)?, [self.plan.workspace_bytes].into()))
    }

    fn check_tokens(&self, num_tokens: usize) -> Result<()> {
        let most = self.most_tokens;
        require(num_tokens <= most, "number of tokens", || format!("at most {most}, as planned"), num_tokens)
    }

    fn check_place(&self, stream: &Stream) -> Result<()> {
        if stream.device().context().ordinal() == self.device.context().ordinal() {
            return Ok(());
        }
        Err(Error::Place { operation: OPERATION, argument: "the plan", place: "GPU" })
    }

    fn check_call(&self, stream: &Stream, num_tokens: usize, input: &MoeInput<'_>, topk_wanted: bool) -> Result<()> {
        self.check_place(stream)?;
        self.check_tokens(num_tokens)?;
        let gate_in_vain = input.shared_gate.is_some() && self.shape.num_shared == 0;
        require(!gate_in_vain, "shared_gate", || "absent without shared experts".to_owned(), "given")?;
        let given = matches!(input.routing, MoeRouting::Given { .. });
        require(!(given && topk_wanted), "topk buffers", || "absent where the routing is given".to_owned(), "given")?;
        let complexity = self.shape.routing.adaptive() == Adaptive::Complexity;
        let expected =
            || "MoeRouting::Given with Adaptive::Complexity: run `router` with the complexity first".to_owned();
        require(given || !complexity, "routing", expected, "MoeRouting::Logits")
    }
}

/// A setting that must hold.
fn require(
    holds: bool,
    setting: &'static str,
    expected: impl FnOnce() -> String,
    got: impl fmt::Display,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Setting { operation: OPERATION, setting, expected: expected(), got: got.to_string() })
}

/// What a layer does with a number of tokens, chosen by a pure function of the shape and the GPU, and what bounds it.
/// Its `Display` says it in a few lines.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct MoePlan {
    /// The layer's shape.
    pub shape: MoeShape,
    /// T.
    pub num_tokens: usize,
    /// [`Arch::Sm80`] or [`Arch::Sm90`].
    pub arch: Arch,
    /// Rows of weights of a tile of the expert products; 0 where the products choose by themselves.
    pub tile_rows: usize,
    /// Most tokens of a tile.
    pub tile_tokens: usize,
    /// Tiles on their way to shared memory at a time.
    pub stages: usize,
    /// Blocks of the expert products' launch.
    pub blocks: usize,
    /// Kernels from logits to output.
    pub launches: usize,
    /// Bytes of workspace.
    pub workspace_bytes: usize,
}

impl MoePlan {
    fn of(device: &Device, shape: &MoeShape, num_tokens: usize, arch: Arch) -> Result<Self> {
        Launch::bind(OPERATION, device)?;
        let params = shape.to_sys(num_tokens, arch)?;
        // SAFETY: integers and enums whose first value is 0.
        let mut plan: sys::AnabranchMoePlan = unsafe { std::mem::zeroed() };
        // SAFETY: both point to live values of their types.
        let status = unsafe { sys::anabranch_moe_plan(&raw const params, num_tokens as u64, &raw mut plan) };
        if status == sys::AnabranchStatus::ANABRANCH_STATUS_UNSUPPORTED {
            let (major, minor) = device.capability();
            return Err(Error::Setting {
                operation: OPERATION,
                setting: "arch",
                expected: "auto or sm80; sm90 is for compute capability 9.0".to_owned(),
                got: format!("{arch}, with compute capability {major}.{minor} and hidden size {}", shape.hidden_size),
            });
        }
        launched(OPERATION, status)?;
        Ok(Self {
            shape: *shape,
            num_tokens,
            arch: Arch::of_sys(plan.arch),
            tile_rows: plan.tile_rows as usize,
            tile_tokens: plan.tile_tokens as usize,
            stages: plan.stages as usize,
            blocks: plan.blocks as usize,
            launches: plan.launches as usize,
            workspace_bytes: plan.workspace_bytes as usize,
        })
    }

    /// Floating-point operations of both products, `6 T (K + S) d n`: what the layer cannot do without.
    pub fn flops(&self) -> f64 {
        let visits = self.num_tokens as f64 * (self.shape.routing.topk() + self.shape.num_shared) as f64;
        6.0 * visits * self.shape.hidden_size as f64 * self.shape.intermediate_size as f64
    }

    /// Most experts that the tokens can hit, shared ones included.
    pub fn most_experts_hit(&self) -> usize {
        let pairs = self.num_tokens.saturating_mul(self.shape.routing.topk());
        let shared = if self.num_tokens == 0 { 0 } else { self.shape.num_shared };
        pairs.min(self.shape.routing.num_experts()) + shared
    }

    /// Bytes that must move if `experts_hit` experts, shared ones included, have a token: their weights once, x and the
    /// output once.
    pub fn bytes(&self, experts_hit: usize) -> f64 {
        let expert = 6.0 * self.shape.hidden_size as f64 * self.shape.intermediate_size as f64;
        expert * experts_hit as f64 + 4.0 * self.num_tokens as f64 * self.shape.hidden_size as f64
    }
}

impl fmt::Display for MoePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MoeShape { routing, hidden_size, intermediate_size, num_shared } = self.shape;
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        write!(f, "moe_layer   {} of {} experts", routing.topk(), routing.num_experts())?;
        if num_shared > 0 {
            write!(f, " and {num_shared} shared")?;
        }
        writeln!(
            f,
            ", hidden {hidden_size}, width {intermediate_size}, {} token{}",
            self.num_tokens,
            plural(self.num_tokens)
        )?;
        let instructions = if self.arch == Arch::Sm90 { "TMA and wgmma" } else { "mma.sync" };
        writeln!(
            f,
            "path        {} ({instructions}), {} launch{}",
            self.arch,
            self.launches,
            if self.launches == 1 { "" } else { "es" }
        )?;
        if self.tile_rows > 0 {
            write!(
                f,
                "tiles       {} row{} of weights by {} token{}",
                self.tile_rows,
                plural(self.tile_rows),
                self.tile_tokens,
                plural(self.tile_tokens)
            )?;
            writeln!(
                f,
                ", {} stage{}, {} block{}",
                self.stages,
                plural(self.stages),
                self.blocks,
                plural(self.blocks)
            )?;
        }
        writeln!(f, "workspace   {}", scaled(self.workspace_bytes as f64, "B"))?;
        let hit = self.most_experts_hit();
        write!(
            f,
            "floor       {}, {} if {hit} expert{} hit",
            scaled(self.flops(), "FLOP"),
            scaled(self.bytes(hit), "B"),
            if hit == 1 { " is" } else { "s are" }
        )
    }
}

/// Three digits and a decimal prefix.
fn scaled(value: f64, unit: &str) -> String {
    let prefixes = ["", "k", "M", "G", "T", "P", "E"];
    let mut step = 0;
    let mut value = value;
    // 999.5 would print as 1000.
    while value >= 999.5 && step + 1 < prefixes.len() {
        value /= 1000.0;
        step += 1;
    }
    let digits = if step == 0 || value >= 99.95 {
        0
    } else if value >= 9.995 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {}{unit}", prefixes[step])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(num_shared: usize, num_tokens: usize, tile_rows: usize) -> MoePlan {
        let routing = Routing::builder(128, 8).build().unwrap();
        MoePlan {
            shape: MoeShape { routing, hidden_size: 2048, intermediate_size: 768, num_shared },
            num_tokens,
            arch: if tile_rows > 0 { Arch::Sm90 } else { Arch::Sm80 },
            tile_rows,
            tile_tokens: 256,
            stages: 4,
            blocks: 132,
            launches: if tile_rows > 0 { 1 } else { 6 },
            workspace_bytes: 123_456_789,
        }
    }

    #[test]
    fn the_environment_decides_where_the_caller_does_not() {
        assert_eq!(Arch::Auto.resolve(None), Ok(Arch::Auto));
        assert_eq!(Arch::Auto.resolve(Some("")), Ok(Arch::Auto));
        assert_eq!(Arch::Auto.resolve(Some("sm80")), Ok(Arch::Sm80));
        assert_eq!(Arch::Sm90.resolve(Some("sm80")), Ok(Arch::Sm90));
        assert_eq!(Arch::Sm90.resolve(Some("nonsense")), Ok(Arch::Sm90));
        let error = Arch::Auto.resolve(Some("sm_80")).unwrap_err();
        assert_eq!(error.to_string(), "moe_layer: ANABRANCH_ARCH must be auto, sm80 or sm90, got sm_80");
    }

    #[test]
    fn the_floor_is_the_formula() {
        let plan = plan(2, 16, 128);
        assert_eq!(plan.flops(), 6.0 * 16.0 * 10.0 * 2048.0 * 768.0);
        assert_eq!(plan.most_experts_hit(), 130);
        assert_eq!(plan.bytes(7), 7.0 * 6.0 * 2048.0 * 768.0 + 4.0 * 16.0 * 2048.0);
        assert_eq!(
            (super::tests::plan(2, 1, 0).most_experts_hit(), super::tests::plan(2, 0, 0).most_experts_hit()),
            (10, 0)
        );
    }

    #[test]
    fn a_description_is_a_few_lines() {
        let expected = "moe_layer   8 of 128 experts and 1 shared, hidden 2048, width 768, 4096 tokens\n\
                        path        sm90 (TMA and wgmma), 1 launch\n\
                        tiles       128 rows of weights by 256 tokens, 4 stages, 132 blocks\n\
                        workspace   123 MB\n\
                        floor       348 GFLOP, 1.25 GB if 129 experts are hit";
        assert_eq!(plan(1, 4096, 128).to_string(), expected);
        let expected = "moe_layer   8 of 128 experts, hidden 2048, width 768, 1 token\n\
                        path        sm80 (mma.sync), 6 launches\n\
                        workspace   123 MB\n\
                        floor       75.5 MFLOP, 75.5 MB if 8 experts are hit";
        assert_eq!(plan(0, 1, 0).to_string(), expected);
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in
            [(0.0, "0 B"), (999.0, "999 B"), (1000.0, "1.00 kB"), (12_345.0, "12.3 kB"), (999_600.0, "1.00 MB")]
        {
            assert_eq!(scaled(value, "B"), text);
        }
    }

    #[test]
    fn shapes_out_of_range_are_refused() {
        let routing = Routing::builder(1000, 31).build().unwrap();
        let shape = MoeShape { routing, hidden_size: 64, intermediate_size: 8, num_shared: 1 };
        assert_eq!(shape.check(), Ok(()));
        let refused = |shape: MoeShape| shape.check().unwrap_err().to_string();
        assert_eq!(
            refused(MoeShape { num_shared: 2, ..shape }),
            "moe_layer: num_shared must be at most 1 beside 31 of 1000 routed experts, got 2"
        );
        assert_eq!(
            refused(MoeShape { hidden_size: 12, ..shape }),
            "moe_layer: hidden_size must be a multiple of 8 from 8 to 2^30, got 12"
        );
        assert!(refused(MoeShape { intermediate_size: 0, ..shape }).contains("intermediate_size"));
    }
}
