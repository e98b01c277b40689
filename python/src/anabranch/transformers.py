"""Hugging Face Transformers models with their experts run by anabranch.

::

    import anabranch.transformers
    anabranch.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map="cuda", experts_implementation="anabranch")

Transformers 5.7 or newer. Router, shared experts and residual stay the model's own; what runs here is the routed experts, in bfloat16, with
SwiGLU. Other experts (biases, interleaved or transposed weights, another activation, no gate, FP8) are refused by name when they are first called.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from .torch import experts

__all__ = ["experts_forward", "register"]

OLDEST = (5, 7)
NAME = "anabranch"

# What a class of experts says of itself, and what it must say here. Older releases lack some of the flags.
_FLAGS = {
    "has_gate": (True, "without a gate"),
    "has_bias": (False, "with biases"),
    "is_transposed": (False, "with transposed weights"),
    "is_concatenated": (True, "with interleaved gate and up weights"),
    "has_post_expert_norm": (False, "with a norm after the experts"),
}


def register(name: str = NAME) -> None:
    """Makes ``experts_implementation=name`` known to Transformers, also for models that are loaded already
    (``model.set_experts_implementation(name)``).

    :raises ImportError: if Transformers is older than 5.7, which takes no experts of others.
    """
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST:
        raise ImportError(f"anabranch needs Transformers {OLDEST[0]}.{OLDEST[1]} or newer, got {transformers.__version__}")
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(name, experts_forward)
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    except ImportError:
        return
    # FP8 checkpoints look their experts up elsewhere; there the name must be known to be refused in words.
    FP8ExpertsInterface.register(name, _refuse_fp8)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The routed experts of a layer, as Transformers calls them.

    :param self: the module with ``gate_up_proj`` ``[E, 2 n, d]`` and ``down_proj`` ``[E, d, n]``, bfloat16.
    :param hidden_states: ``[T, d]`` bfloat16.
    :param top_k_index: ``[T, K]`` of any integers; an id of ``num_experts`` and above is skipped (expert parallelism's sentinel).
    :param top_k_weights: ``[T, K]`` of any floats; they are used in float32.
    :returns: ``[T, d]`` bfloat16.
    :raises NotImplementedError: if the experts are of a kind that has no kernels here.
    """
    _check_kind(self)
    return experts(
        hidden_states.contiguous(),
        top_k_index.to(torch.int32).contiguous(),
        top_k_weights.to(torch.float32).contiguous(),
        self.gate_up_proj,
        self.down_proj,
    )


def _check_kind(module: nn.Module) -> None:
    kind = type(module).__name__
    for flag, (wanted, words) in _FLAGS.items():
        if getattr(module, flag, wanted) != wanted:
            raise NotImplementedError(f"anabranch has no experts {words}, as {kind} has: choose another experts_implementation")
    activation = getattr(module, "act_fn", None)
    if not (isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"):
        raise NotImplementedError(
            f"anabranch's experts are SwiGLU, but {kind}'s activation is {type(activation).__name__}: choose another "
            "experts_implementation"
        )
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        raise NotImplementedError(
            f"anabranch's experts are SwiGLU, but {kind} gates in a way of its own: choose another experts_implementation"
        )
    if module.gate_up_proj.dtype != torch.bfloat16:
        raise TypeError(
            f"anabranch's experts are bfloat16, but {kind}'s weights are {module.gate_up_proj.dtype}: load the model with "
            "dtype=torch.bfloat16"
        )


def _refuse_fp8(self: nn.Module, *_: Tensor) -> Tensor:
    raise NotImplementedError(
        "anabranch has no FP8 experts: load the checkpoint dequantised to bfloat16, or choose another experts_implementation"
    )
