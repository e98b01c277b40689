#!/usr/bin/env python3
"""The MoE layer as PyTorch and SonicMoE run it, measured as `anabranch bench moe` measures its own.

    python3 benches/peers.py --preset qwen3,mixtral --json peers.json
    anabranch bench moe --preset qwen3,mixtral --plot roofline.svg --peers peers.json

Needs an NVIDIA GPU and torch 2.9 or newer (made with 2.11); SonicMoE is measured, too, if `sonicmoe` can be imported.

The layer is everything from float32 router logits to the bf16 output: softmax over the top-k logits, permutation, both
products, SwiGLU, the weighted sum. Weights and x are random, logits come from the seed that `anabranch bench moe` uses
(or from a file). Every sample lies between two CUDA events, after the second-level cache has been filled with other data; eager
calls and graph launches by turns; the smaller median counts.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import date

import numpy as np
import torch
import torch.nn.functional as F

# hidden size, expert width, experts, experts a token, numbers of tokens
USUAL = [1, 8, 64, 512, 4096, 16384]
SHAPES = {
    "dsmoe16b": (2048, 1408, 64, 6, USUAL),
    "dsv3": (7168, 2048, 256, 8, USUAL),
    "mixtral": (4096, 14336, 8, 2, USUAL),
    "qwen3": (2048, 768, 128, 8, USUAL),
    "sonic7b": (1536, 256, 128, 8, [24576]),
    "sonic4k": (4096, 1024, 128, 8, [32768]),
}
SEED = 20261124
FLOPS, BYTES = 790e12, 4.6e12
LEAST, MOST = 50, 200  # samples
ENOUGH, LONGEST = 0.7, 2.5  # seconds


def seeded_logits(seed, tokens, experts, routing):
    """As crates/cli/src/commands/bench/logits.rs makes them: splitmix64's halves, then Box-Muller or Gumbel noise."""
    with np.errstate(over="ignore"):
        at = np.arange(1, tokens * experts + 1, dtype=np.uint64)
        bits = np.uint64(seed) + at * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
    halves = bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)
    u, v = ((half.astype(np.float64) + 0.5) / 2.0**32 for half in halves)
    expert = np.tile(np.arange(experts, dtype=np.float64), tokens)
    normal = np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)
    logits = {
        "normal": normal,
        "zipf": -np.log(-np.log(u)) - np.log(expert + 1.0),
        "one": normal - 20.0 * expert,
    }[routing]
    return torch.from_numpy(logits.astype(np.float32).reshape(tokens, experts)).cuda()


def file_logits(path, name):
    """A tensor of a safetensors file, or None."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        if name not in header:
            return None
        start, end = header[name]["data_offsets"]
        file.seek(start, 1)
        values = np.frombuffer(file.read(end - start), dtype="<f4").reshape(header[name]["shape"])
    return torch.from_numpy(values.copy()).cuda()


def grouped_mm(x, weights, offsets):
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return multiply(x, weights.transpose(1, 2), offs=offsets)


def torch_layer(x, logits, gate_up, down, topk):
    tokens, experts = logits.shape
    weights, ids = torch.topk(logits, topk)
    weights = torch.softmax(weights, -1)
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    offsets = torch.cumsum(counts, 0, dtype=torch.int32)
    gate, up = grouped_mm(x[order // topk], gate_up, offsets).chunk(2, -1)
    y = grouped_mm(F.silu(gate) * up, down, offsets)
    back = torch.empty_like(y)
    back[order] = y
    return torch.bmm(weights.to(x.dtype).unsqueeze(1), back.view(tokens, topk, -1)).squeeze(1)


def sonic_layer():
    """SonicMoE's own layer without its gate product, and what its weights look like; None if it is not there."""
    try:
        from sonicmoe import functional
        from sonicmoe.enums import ActivationType
    except ImportError as error:
        print(f"SonicMoE left out: {error}", file=sys.stderr)
        return None

    def layer(x, logits, w1, w2, topk):
        tokens, experts = logits.shape
        scores, ids = functional.TC_Softmax_Topk_Router_Function.apply(logits, experts, topk)
        stream = torch.cuda.current_stream().cuda_stream
        pairs = lambda: torch.empty(tokens * topk, dtype=torch.int32, device=x.device)
        scatter, reverse, gather = pairs(), pairs(), pairs()
        frequency = torch.empty(experts, dtype=torch.int32, device=x.device)
        offsets = torch.empty(experts + 1, dtype=torch.int32, device=x.device)
        functional.TC_topk_router_metadata_triton(ids, experts, frequency, offsets, gather, scatter, reverse)
        h, z = functional._UpProjection.apply(
            x, w1, None, offsets, tokens * topk, topk, stream, gather, scatter, reverse, None, False,
            ActivationType.SWIGLU, True,
        )
        return functional._DownProjection.apply(
            h, z, w2, None, scores, offsets, tokens, topk, stream, gather, scatter, reverse, None, False,
            ActivationType.SWIGLU,
        )

    def convert(gate_up, down):
        """Gate and up rows by turns, [2 n, d, E] and [d, n, E], the expert outermost in memory."""
        experts, rows, hidden = gate_up.shape
        turns = gate_up.view(experts, 2, rows // 2, hidden).transpose(1, 2).reshape(experts, rows, hidden)
        return turns.permute(1, 2, 0), down.permute(1, 2, 0)

    return layer, convert


def reference(x, logits, gate_up, down, topk, tokens):
    """Some tokens' outputs in float32."""
    weights, ids = torch.topk(logits[tokens], topk)
    weights = torch.softmax(weights, -1)
    out = torch.zeros(len(tokens), x.shape[1], device=x.device)
    for row, token in enumerate(tokens):
        for weight, expert in zip(weights[row], ids[row]):
            gate, up = (gate_up[expert].float() @ x[token].float()).chunk(2)
            out[row] += weight * (down[expert].float() @ (F.silu(gate) * up))
    return out


class Clock:
    def __init__(self):
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.other = torch.zeros(5 * cache // 8, dtype=torch.float32, device="cuda")

    def sample(self, call):
        # Read, not written: written data would have to leave the cache at the cost of what is measured.
        self.other.sum()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        return start, end

    def measure(self, call):
        """Microseconds of eager calls and of graph launches (None where the call cannot be captured), sorted."""
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        calls = [call]
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            calls.append(graph.replay)
        except RuntimeError as error:
            print(f"no graph: {error}", file=sys.stderr)
        times = [[] for _ in calls]
        begin, warm = time.monotonic(), False
        while True:
            batch = [[self.sample(one) for one in calls] for _ in range(10)]
            torch.cuda.synchronize()
            if warm:
                for row in batch:
                    for into, (start, end) in zip(times, row):
                        into.append(start.elapsed_time(end) * 1e3)
            warm = True
            count, spent = len(times[0]), time.monotonic() - begin
            if count >= MOST or (count >= LEAST and spent >= ENOUGH) or (count >= LEAST / 3 and spent >= LONGEST):
                return [sorted(one) for one in times] + [None] * (2 - len(calls))


def point(peer, name, call, clock, inputs, shape, tokens):
    x, logits, gate_up, down = inputs
    hidden, width, experts, topk = shape
    chosen = torch.linspace(0, tokens - 1, min(tokens, 4)).long().tolist()
    expected = reference(x, logits, gate_up, down, topk, chosen)
    error = ((call()[chosen].float() - expected).norm() / expected.norm()).item()
    eager, graph = clock.measure(call)
    times, launch = (graph, "graph") if graph and np.median(graph) <= np.median(eager) else (eager, "eager")
    us = float(np.median(times))
    hit = torch.topk(logits, topk).indices.unique().numel()
    flops, weights = 6.0 * tokens * topk * hidden * width, 6.0 * hit * hidden * width
    print(f"{peer}, {name}, {tokens} tokens: {us:.1f} us ({launch}), error {error:.1e}", file=sys.stderr)
    return {
        "peer": peer, "shape": name, "hidden": hidden, "intermediate": width, "experts": experts, "topk": topk,
        "tokens": tokens, "dtype": "bf16", "us_median": round(us, 2), "us_min": round(times[0], 2),
        "us_p90": round(times[-(-len(times) * 9 // 10) - 1], 2), "experts_hit": hit,
        "tflops": round(flops / us / 1e6, 2), "weight_gbps": round(weights / us / 1e3, 1),
        "floor_us": round(max(flops / FLOPS, (weights + 4.0 * tokens * hidden) / BYTES) * 1e6, 2),
        "rel_error": error, "launch": launch, "us_eager": round(float(np.median(eager)), 2),
        "us_graph": round(float(np.median(graph)), 2) if graph else None, "samples": len(times),
    }


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="all", help="names, comma-separated, of " + ", ".join(SHAPES) + "; or all")
    parser.add_argument("--tokens", help="numbers of tokens, comma-separated [default: the preset's]")
    parser.add_argument("--routing", choices=["normal", "zipf", "one"], default="normal")
    parser.add_argument("--logits", help="safetensors file of logits, NAME.T; made from the seed where it has none")
    parser.add_argument("--json", help="where to write all points")
    options = parser.parse_args()
    names = list(SHAPES) if options.preset == "all" else options.preset.split(",")
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        parser.error(f"there is no preset {', '.join(unknown)}")

    clock, sonic, points = Clock(), sonic_layer(), []
    for name in names:
        *shape, usual = SHAPES[name]
        hidden, width, experts, topk = shape
        torch.manual_seed(SEED)
        make = lambda *sizes: torch.empty(sizes, dtype=torch.bfloat16, device="cuda").normal_(0, sizes[-1] ** -0.5)
        gate_up, down = make(experts, 2 * width, hidden), make(experts, hidden, width)
        for tokens in [int(number) for number in options.tokens.split(",")] if options.tokens else usual:
            x = torch.randn(tokens, hidden, device="cuda").bfloat16()
            logits = file_logits(options.logits, f"{name}.{tokens}") if options.logits else None
            if logits is None:
                logits = seeded_logits(SEED, tokens, experts, options.routing)
            inputs = x, logits, gate_up, down
            peers = {"torch grouped_mm": lambda: torch_layer(*inputs, topk)}
            if sonic:
                layer, convert = sonic
                w1, w2 = convert(gate_up, down)
                peers["SonicMoE"] = lambda: layer(x, logits, w1, w2, topk)
            for peer, call in peers.items():
                try:
                    points.append(point(peer, name, call, clock, inputs, shape, tokens))
                except (RuntimeError, TypeError, AttributeError) as error:
                    print(f"{peer}, {name}, {tokens} tokens: left out: {error}", file=sys.stderr)
            w1 = w2 = peers = None
        gate_up = down = inputs = None
        torch.cuda.empty_cache()

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    result = {
        "device": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda,
        "date": date.today().isoformat(), "software": f"torch {torch.__version__}", "points": points,
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
