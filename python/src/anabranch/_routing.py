"""A router's rule as one validated value."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal, Mapping

from . import _library

Score = Literal["softmax", "sigmoid", "topk_softmax"]
Renormalize = Literal["none", "sum"]
GroupScore = Literal["max", "top2_sum"]
Adaptive = Literal["fixed", "entropy"]
Arch = Literal["auto", "sm80", "sm90"]


def choice(field: str, value: str, choices: Mapping[str, int]) -> int:
    """The number of a word, or a ``ValueError`` that lists the words."""
    number = choices.get(value)
    if number is None:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")
    return number


@dataclass(frozen=True)
class Routing:
    """How logits become expert ids and weights.

    Mixtral and Qwen3-MoE: ``Routing(E, K, renormalize="sum")``. DeepSeek-V3: ``Routing(256, 8, score="sigmoid",
    renormalize="sum", scale=2.5, n_group=8, topk_group=4, group_score="top2_sum")``.

    :param num_experts: E, 1 to 1024.
    :param topk: K, 1 to 32, experts a token.
    :param score: softmax or sigmoid of the logits, or ``topk_softmax``: softmax over the chosen only.
    :param renormalize: ``sum`` divides the chosen scores by their sum.
    :param scale: multiplies the weights, last.
    :param n_group: equal, contiguous groups of experts; 0 for no limit.
    :param topk_group: groups that a token may choose from.
    :param group_score: how a group is judged: by its best expert or its two best.
    :param adaptive: ``entropy`` lets a token use fewer slots the surer its router is.
    :param expert_capacity: tokens an expert accepts; 0 if nothing is dropped.
    :raises ValueError: if a setting is out of range or contradicts another.
    """

    num_experts: int
    topk: int
    score: Score = "softmax"
    renormalize: Renormalize = "none"
    scale: float = 1.0
    n_group: int = 0
    topk_group: int = 0
    group_score: GroupScore = "max"
    adaptive: Adaptive = "fixed"
    expert_capacity: int = 0

    def __post_init__(self) -> None:
        for field in ("num_experts", "topk", "n_group", "topk_group", "expert_capacity"):
            value = getattr(self, field)
            if not isinstance(value, int):
                raise TypeError(f"{field} must be an int, got {type(value).__name__}")
            if not 0 <= value < 2**32:
                raise ValueError(f"{field} must be 0 to 2^32 - 1, got {value}")
        if self.adaptive == "complexity":
            raise ValueError("adaptive must be fixed or entropy: a layer takes no complexity")
        struct, needed = self.to_struct(), ctypes.c_uint64()
        _library.check(_library.LIBRARY.anabranch_router_workspace(struct, 1, needed))

    def to_struct(self) -> _library.RoutingStruct:
        """As the C library takes it."""
        return _library.RoutingStruct(
            num_experts=self.num_experts,
            topk=self.topk,
            score=choice("score", self.score, _library.SCORES),
            renormalize=choice("renormalize", self.renormalize, _library.RENORMALIZE),
            scale=self.scale,
            n_group=self.n_group,
            topk_group=self.topk_group,
            group_score=choice("group_score", self.group_score, _library.GROUP_SCORES),
            adaptive=choice("adaptive", self.adaptive, _library.ADAPTIVE),
            expert_capacity=self.expert_capacity,
        )
