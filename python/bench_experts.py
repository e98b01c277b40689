"""The routed experts of published models: anabranch against Transformers' own backends, in one run.

    python3 bench_experts.py [--models qwen3,mixtral] [--tokens 1,8,64,512,4096] [--json FILE]

Each backend is called as Transformers calls it: with hidden states, int64 ids and weights of a routing that is drawn evenly. Median of CUDA event
times in microseconds, of one eager call and of the same call in a CUDA graph, after the second-level cache was overwritten. Random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import types

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import anabranch.transformers

# hidden_size, intermediate_size, experts, experts a token
SHAPES = {
    "qwen3": (2048, 768, 128, 8),
    "dsmoe16b": (2048, 1408, 64, 6),
    "mixtral": (4096, 14336, 8, 2),
    "dsv3": (7168, 2048, 256, 8),
}
BACKENDS = ("anabranch", "grouped_mm", "batched_mm")
# batched_mm gathers the weights of every pair.
MOST_GATHERED = 24e9
SAMPLES = 20


def module(shape):
    """What the backends see of a class of experts."""
    hidden, width, experts, _ = shape
    generator = torch.Generator("cuda").manual_seed(1)

    def weights(*sizes):
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16, generator=generator).mul_(0.02)

    of = types.SimpleNamespace(
        num_experts=experts,
        gate_up_proj=weights(experts, 2 * width, hidden),
        down_proj=weights(experts, hidden, width),
        act_fn=nn.SiLU(),
        has_gate=True,
        has_bias=False,
        is_transposed=False,
        is_concatenated=True,
        has_post_expert_norm=False,
        _is_expert_parallel=False,
        training=False,
    )
    of._apply_gate = lambda gate_up: nn.functional.silu(gate_up.chunk(2, -1)[0]) * gate_up.chunk(2, -1)[1]
    return of


def median(call, flush):
    """Median microseconds of a call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(SAMPLES):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def captured(call):
    """The call as a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,64,512,4096")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    anabranch.transformers.register()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    points = []
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'model':<10}{'T':>6}" + "".join(f"{name:>13}{'graph':>10}{'error':>9}" for name in BACKENDS))
    for name in arguments.models.split(","):
        hidden, width, experts, topk = SHAPES[name]
        of = module(SHAPES[name])
        for tokens in map(int, arguments.tokens.split(",")):
            generator = torch.Generator("cuda").manual_seed(tokens)
            x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
            scores = torch.rand(tokens, experts, device="cuda", generator=generator)
            weights, ids = scores.softmax(-1).topk(topk, -1)
            weights = weights / weights.sum(-1, keepdim=True)
            line, reference = f"{name:<10}{tokens:>6}", None
            for backend in BACKENDS:
                gathered = 6.0 * tokens * topk * hidden * width
                if backend == "batched_mm" and gathered > MOST_GATHERED:
                    line += f"{'-':>13}{'-':>10}{'-':>9}"
                    continue
                run = ALL_EXPERTS_FUNCTIONS[backend]

                def call(run=run):
                    return run(of, x, ids, weights)

                out = call().float()
                reference = out if reference is None else reference
                error = ((out - reference).norm() / reference.norm()).item()
                eager = median(call, flush)
                try:
                    graph = median(captured(call), flush)
                except RuntimeError:
                    graph = float("nan")
                line += f"{eager:>13.1f}{graph:>10.1f}{error:>9.1e}"
                points.append(
                    dict(model=name, tokens=tokens, backend=backend, eager_us=eager, graph_us=graph, difference=error)
                )
            print(line, flush=True)
        del of
        torch.cuda.empty_cache()
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, points=points), file, indent=1)


if __name__ == "__main__":
    main()
