"""The MoE layer as operations of PyTorch.

::

    out[t] = sum_k topk_weights[t, k] E_k(x[t]) + g[t] sum_s S_s(x[t])      E(x) = (silu(x W_gate^T) * (x W_up^T)) W_down^T

:func:`moe` routes by logits, :func:`experts` takes a routing made elsewhere. Both run on the current stream of x's GPU, read the tensors where they
are, allocate the output and a workspace through PyTorch's allocator, never wait, and can be captured in CUDA graphs. They are
``torch.ops.anabranch.moe`` and ``experts`` to ``torch.compile``, which does not look inside. The same call gives the same bits. There is no backward
pass: calling ``backward`` through them raises ``NotImplementedError``.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Optional

import torch
from torch import Tensor

from . import _library
from ._routing import Adaptive, Arch, GroupScore, Renormalize, Routing, Score, choice

__all__ = ["describe", "experts", "moe"]


def moe(
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing: Routing,
    *,
    selection_bias: Optional[Tensor] = None,
    num_shared: int = 0,
    shared_gate: Optional[Tensor] = None,
    arch: Arch = "auto",
) -> Tensor:
    """A layer from its router's logits.

    All tensors are contiguous, on one GPU, and start on 16 bytes.

    :param x: ``[T, d]`` bfloat16; d is a multiple of 8.
    :param logits: ``[T, E]`` float32, the gate product.
    :param gate_up: ``[E + S, 2 n, d]`` bfloat16: gate rows, then up rows of every expert, shared ones last; n is a multiple of 8.
    :param down: ``[E + S, d, n]`` bfloat16.
    :param routing: the router's rule, of E experts; make it outside of a function that is compiled.
    :param selection_bias: ``[E]`` float32: steers the choice but never the weights (``e_score_correction_bias``).
    :param num_shared: S, experts that every token visits.
    :param shared_gate: ``[T]`` float32: logits whose sigmoid scales the shared experts' sum.
    :param arch: ``sm80`` forces the portable kernels, ``sm90`` Hopper's.
    :returns: ``[T, d]`` bfloat16.
    :raises TypeError: if a tensor has another data type.
    :raises ValueError: if a shape, device, layout or setting does not fit. Nothing is launched then.
    """
    return torch.ops.anabranch.moe(
        x,
        logits,
        gate_up,
        down,
        selection_bias,
        shared_gate,
        routing.num_experts,
        routing.topk,
        routing.score,
        routing.renormalize,
        routing.scale,
        routing.n_group,
        routing.topk_group,
        routing.group_score,
        routing.adaptive,
        routing.expert_capacity,
        num_shared,
        arch,
    )


def experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    num_shared: int = 0,
    shared_gate: Optional[Tensor] = None,
    arch: Arch = "auto",
) -> Tensor:
    """A layer with a routing made elsewhere; the other arguments are those of :func:`moe`.

    :param topk_ids: ``[T, K]`` int32; an id that is no routed expert's (-1, or E and above) adds nothing.
    :param topk_weights: ``[T, K]`` float32, used as they are.
    """
    return torch.ops.anabranch.experts(x, topk_ids, topk_weights, gate_up, down, shared_gate, num_shared, arch)


def describe(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    routing: Routing,
    *,
    num_shared: int = 0,
    arch: Arch = "auto",
) -> str:
    """What a call of ``num_tokens`` tokens does on the current GPU: path, tiles, workspace, and the least time's FLOPs and bytes."""
    plan = _plan(routing, hidden_size, intermediate_size, num_shared, arch, torch.cuda.current_device(), _room(num_tokens))
    text = ctypes.create_string_buffer(1024)
    _library.check(_library.LIBRARY.anabranch_plan_describe(plan.handle, num_tokens, text, len(text)))
    return text.value.decode()


class _Plan:
    """A plan of the library, destroyed with this."""

    def __init__(self, shape: _library.MoeShapeStruct, most_tokens: int) -> None:
        self.handle = ctypes.c_void_p()
        _library.check(_library.LIBRARY.anabranch_plan_create(shape, most_tokens, self.handle))
        self.workspace_bytes = functools.lru_cache(maxsize=4096)(self._workspace_bytes)

    def _workspace_bytes(self, num_tokens: int) -> int:
        needed = ctypes.c_uint64()
        _library.check(_library.LIBRARY.anabranch_plan_workspace(self.handle, num_tokens, needed))
        return needed.value

    # Bound early: when the interpreter ends, modules may be empty before the last plan goes.
    def __del__(self, destroy: Any = _library.LIBRARY.anabranch_plan_destroy) -> None:
        destroy(self.handle)


@functools.lru_cache(maxsize=512)
def _plan(
    routing: Routing, hidden_size: int, intermediate_size: int, num_shared: int, arch: Arch, device: int, most_tokens: int
) -> _Plan:
    """The plan of a shape, made once; the device is the current one."""
    del device
    shape = _library.MoeShapeStruct(
        routing=routing.to_struct(),
        num_shared=num_shared,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        arch=choice("arch", arch, _library.ARCHS),
    )
    return _Plan(shape, most_tokens)


# Rules by their fields: an operation's arguments are numbers and words, and validating them costs a call.
_routing = functools.lru_cache(maxsize=512)(Routing)


def _room(num_tokens: int) -> int:
    """The number of tokens to plan for: the next power of two, so that there are few plans."""
    return 1 << max(num_tokens - 1, 0).bit_length()


def _check(
    name: str, tensor: Optional[Tensor], dtype: torch.dtype, shape: tuple[Optional[int], ...], device: torch.device
) -> None:
    """A tensor that the kernels can read where it is; None in a shape is any size."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}: convert it with .to({dtype})")
    if tensor.dim() != len(shape) or any(want is not None and want != got for want, got in zip(shape, tensor.shape)):
        words = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{words}], got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device} as x is, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}: pass {name}.contiguous()")


def _check_layer(
    x: Tensor, gate_up: Tensor, down: Tensor, shared_gate: Optional[Tensor], num_shared: int
) -> tuple[int, int, int, int]:
    """Checks what both operations take. Returns T, d, n and E."""
    if x.dim() != 2:
        raise ValueError(f"x must have shape [tokens, hidden_size], got {list(x.shape)}")
    num_tokens, hidden_size = x.shape
    _check("x", x, torch.bfloat16, (None, None), x.device)
    _check("down", down, torch.bfloat16, (None, hidden_size, None), x.device)
    total, _, intermediate_size = down.shape
    _check("gate_up", gate_up, torch.bfloat16, (total, 2 * intermediate_size, hidden_size), x.device)
    _check("shared_gate", shared_gate, torch.float32, (num_tokens,), x.device)
    if not 0 <= num_shared < total:
        raise ValueError(f"num_shared must be 0 to {total - 1} with weights of {total} experts, got {num_shared}")
    if shared_gate is not None and num_shared == 0:
        raise ValueError("shared_gate must be None without shared experts")
    return num_tokens, hidden_size, intermediate_size, total - num_shared


def _pointer(tensor: Optional[Tensor]) -> Optional[int]:
    return None if tensor is None else tensor.data_ptr()


def _forward(
    routing: Routing,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate: Optional[Tensor],
    num_shared: int,
    arch: Arch,
    **judged_by: Optional[Tensor],
) -> Tensor:
    """Launches the layer; everything but alignment and ranges has been checked."""
    if x.device.type != "cuda":
        raise ValueError(f"x must be on a CUDA device, got {x.device}")
    num_tokens, hidden_size = x.shape
    device = x.device.index
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out
    with torch.cuda.device(device):
        plan = _plan(routing, hidden_size, down.shape[2], num_shared, arch, device, _room(num_tokens))
        needed = plan.workspace_bytes(num_tokens)
        workspace = torch.empty(needed, dtype=torch.uint8, device=x.device)
        params = _library.ForwardParamsStruct(
            num_tokens=num_tokens,
            x=x.data_ptr(),
            shared_gate=_pointer(shared_gate),
            gate_up=gate_up.data_ptr(),
            down=down.data_ptr(),
            out=out.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_bytes=needed,
            **{name: _pointer(tensor) for name, tensor in judged_by.items()},
        )
        stream = torch.cuda.current_stream(device).cuda_stream
        _library.check(_library.LIBRARY.anabranch_plan_forward(plan.handle, params, stream))
    return out


def _check_moe(
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    selection_bias: Optional[Tensor],
    shared_gate: Optional[Tensor],
    num_experts: int,
    num_shared: int,
) -> None:
    num_tokens, _, _, experts = _check_layer(x, gate_up, down, shared_gate, num_shared)
    if num_experts != experts:
        raise ValueError(f"routing.num_experts must be {experts}, the routed experts of gate_up, got {num_experts}")
    _check("logits", logits, torch.float32, (num_tokens, num_experts), x.device)
    _check("selection_bias", selection_bias, torch.float32, (num_experts,), x.device)


def _moe(
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    selection_bias: Optional[Tensor],
    shared_gate: Optional[Tensor],
    num_experts: int,
    topk: int,
    score: Score,
    renormalize: Renormalize,
    scale: float,
    n_group: int,
    topk_group: int,
    group_score: GroupScore,
    adaptive: Adaptive,
    expert_capacity: int,
    num_shared: int,
    arch: Arch,
) -> Tensor:
    _check_moe(x, logits, gate_up, down, selection_bias, shared_gate, num_experts, num_shared)
    routing = _routing(
        num_experts, topk, score, renormalize, scale, n_group, topk_group, group_score, adaptive, expert_capacity
    )
    return _forward(
        routing, x, gate_up, down, shared_gate, num_shared, arch, logits=logits, selection_bias=selection_bias
    )


def _fake_moe(
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    selection_bias: Optional[Tensor],
    shared_gate: Optional[Tensor],
    num_experts: int,
    *rest: Any,
) -> Tensor:
    _check_moe(x, logits, gate_up, down, selection_bias, shared_gate, num_experts, num_shared=rest[-2])
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate: Optional[Tensor],
    num_shared: int,
) -> int:
    num_tokens, _, _, num_experts = _check_layer(x, gate_up, down, shared_gate, num_shared)
    _check("topk_ids", topk_ids, torch.int32, (num_tokens, None), x.device)
    _check("topk_weights", topk_weights, torch.float32, (num_tokens, topk_ids.shape[1]), x.device)
    return num_experts


def _experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate: Optional[Tensor],
    num_shared: int,
    arch: Arch,
) -> Tensor:
    num_experts = _check_experts(x, topk_ids, topk_weights, gate_up, down, shared_gate, num_shared)
    # A rule is asked for, but nobody follows it.
    routing = _routing(num_experts, topk_ids.shape[1])
    return _forward(
        routing, x, gate_up, down, shared_gate, num_shared, arch, topk_ids=topk_ids, topk_weights=topk_weights
    )


def _fake_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate: Optional[Tensor],
    num_shared: int,
    arch: Arch,
) -> Tensor:
    _check_experts(x, topk_ids, topk_weights, gate_up, down, shared_gate, num_shared)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _no_backward(*_: Any) -> Any:
    raise NotImplementedError("anabranch has no backward pass: use torch.no_grad() for inference, another backend to train")


_SCHEMAS = {
    "moe": "(Tensor x, Tensor logits, Tensor gate_up, Tensor down, Tensor? selection_bias, Tensor? shared_gate, "
    "int num_experts, int topk, str score, str renormalize, float scale, int n_group, int topk_group, str group_score, "
    "str adaptive, int expert_capacity, int num_shared, str arch) -> Tensor",
    "experts": "(Tensor x, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor down, Tensor? shared_gate, "
    "int num_shared, str arch) -> Tensor",
}
# Inputs keep the strides that they were traced with: the kernels want them contiguous.
_TAGS = (torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))
# Registered for every backend: what is not on a GPU is refused here, in words.
_REGISTRATION = torch.library.Library("anabranch", "DEF")
for _name, _kernel, _fake in (("moe", _moe, _fake_moe), ("experts", _experts, _fake_experts)):
    _REGISTRATION.define(_name + _SCHEMAS[_name], tags=_TAGS)
    _REGISTRATION.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"anabranch::{_name}", _fake, lib=_REGISTRATION)
    torch.library.register_autograd(f"anabranch::{_name}", _no_backward, lib=_REGISTRATION)
