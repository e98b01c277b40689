"""What several tests need: a plain reference, and who runs where there is no GPU."""

from __future__ import annotations

import os
import unittest

try:
    import torch
except ImportError:
    torch = None

REQUIRED = os.environ.get("ANABRANCH_REQUIRE_GPU") == "1"
HAS_GPU = torch is not None and torch.cuda.is_available()

needs_torch = unittest.skipIf(torch is None, "PyTorch is not installed")
# Where a GPU is required, its absence is a failure of the tests themselves.
needs_gpu = unittest.skipUnless(HAS_GPU or (REQUIRED and torch is not None), "no CUDA GPU")


def noise(*shape, seed, size=1.0, dtype=None, device="cuda"):
    """Normal noise, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, generator=generator)).to(dtype or torch.bfloat16).to(device)


def route(routing, logits, selection_bias=None):
    """Ids and weights by a rule without capacity or adaptive k, in float32."""
    scores = logits.sigmoid() if routing.score == "sigmoid" else logits.softmax(-1)
    select = scores if selection_bias is None else scores + selection_bias
    if routing.n_group > 1:
        tokens, experts = select.shape
        groups = select.view(tokens, routing.n_group, -1)
        judged = groups.amax(-1) if routing.group_score == "max" else groups.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(judged, dtype=torch.bool)
        kept.scatter_(1, judged.topk(routing.topk_group, -1).indices, True)
        kept = kept.repeat_interleave(experts // routing.n_group, 1)
        select = select.masked_fill(~kept, -torch.inf)
    ids = select.topk(routing.topk, -1).indices
    weights = scores.gather(1, ids)
    if routing.score == "topk_softmax":
        weights = logits.gather(1, ids).softmax(-1)
    if routing.renormalize == "sum":
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids.int(), weights * routing.scale


def layer(x, ids, weights, gate_up, down, num_shared=0, shared_gate=None):
    """The layer's formula in float32, h in bfloat16 between the products."""
    routed = gate_up.shape[0] - num_shared
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)

    def expert(index, rows):
        gate, up = (rows.float() @ gate_up[index].float().T).chunk(2, -1)
        h = (torch.nn.functional.silu(gate) * up).to(torch.bfloat16)
        return h.float() @ down[index].float().T

    for index in range(routed):
        token, slot = (ids == index).nonzero(as_tuple=True)
        out.index_add_(0, token, weights[token, slot, None].float() * expert(index, x[token]))
    for index in range(routed, gate_up.shape[0]):
        factor = 1 if shared_gate is None else shared_gate.sigmoid()[:, None]
        out += factor * expert(index, x)
    return out


def relative_error(out, expected):
    """Relative Frobenius error."""
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()
