"""``anabranch.torch``: refusals and fake kernels everywhere, results on a GPU against a plain reference."""

import shutil
import threading
import unittest

from anabranch import Routing
from support import HAS_GPU, layer, needs_gpu, needs_torch, noise, relative_error, route, torch

if torch is not None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from anabranch.torch import describe, experts, moe

TOLERANCE = 5e-3


def tensors(tokens=5, hidden=64, width=32, num_experts=8, num_shared=0, device="cuda", seed=1):
    """x, logits, gate_up and down."""
    total = num_experts + num_shared
    return (
        noise(tokens, hidden, seed=seed, device=device),
        noise(tokens, num_experts, seed=seed + 1, dtype=torch.float32, device=device),
        noise(total, 2 * width, hidden, seed=seed + 2, size=0.1, device=device),
        noise(total, hidden, width, seed=seed + 3, size=0.1, device=device),
    )


@needs_torch
class Contracts(unittest.TestCase):
    """What is refused, before anything is launched: no GPU is needed."""

    def setUp(self):
        self.routing = Routing(8, 2)

    def refused(self, error, words, *arguments, **named):
        with self.assertRaises(error) as caught:
            moe(*arguments, self.routing, **named)
        self.assertIn(words, str(caught.exception))

    def test_another_dtype(self):
        x, logits, gate_up, down = tensors(device="cpu")
        self.refused(TypeError, "x must be torch.bfloat16, got torch.float16", x.half(), logits, gate_up, down)
        self.refused(TypeError, "logits must be torch.float32", x, logits.bfloat16(), gate_up, down)
        self.refused(TypeError, "gate_up must be torch.bfloat16", x, logits, gate_up.float(), down)
        bias = torch.zeros(8, dtype=torch.bfloat16)
        self.refused(TypeError, "selection_bias must be torch.float32", x, logits, gate_up, down, selection_bias=bias)

    def test_another_shape(self):
        x, logits, gate_up, down = tensors(device="cpu")
        self.refused(ValueError, "x must have shape [tokens, hidden_size]", x[0], logits, gate_up, down)
        self.refused(ValueError, "logits must have shape [5, 8], got [4, 8]", x, logits[:4], gate_up, down)
        self.refused(ValueError, "gate_up must have shape [8, 64, 64]", x, logits, gate_up[:, :32].contiguous(), down)
        self.refused(ValueError, "routing.num_experts must be 7", x, logits, gate_up[:7], down[:7])
        gate = torch.zeros(4)
        self.refused(ValueError, "shared_gate must have shape [5]", x, logits, gate_up, down, shared_gate=gate)
        self.refused(ValueError, "shared_gate must be None", x, logits, gate_up, down, shared_gate=torch.zeros(5))
        self.refused(ValueError, "num_shared must be 0 to 7", x, logits, gate_up, down, num_shared=8)

    def test_another_layout(self):
        x, logits, gate_up, down = tensors(device="cpu")
        self.refused(ValueError, "gate_up must be contiguous", x, logits, gate_up.mT.contiguous().mT, down)

    def test_another_device(self):
        x, logits, gate_up, down = tensors(device="cpu")
        self.refused(ValueError, "x must be on a CUDA device, got cpu", x, logits, gate_up, down)
        with FakeTensorMode():
            fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (x, logits, gate_up, down)]
            fake[1] = torch.empty(5, 8)
            self.refused(ValueError, "logits must be on cuda:0 as x is, got cpu", *fake)

    def test_experts_given(self):
        x, _, gate_up, down = tensors(device="cpu")
        ids, weights = torch.zeros(5, 2, dtype=torch.int32), torch.zeros(5, 2)
        with self.assertRaisesRegex(TypeError, "topk_ids must be torch.int32, got torch.int64"):
            experts(x, ids.long(), weights, gate_up, down)
        with self.assertRaisesRegex(ValueError, r"topk_weights must have shape \[5, 2\]"):
            experts(x, ids, weights[:, :1].contiguous(), gate_up, down)

    def test_fake_kernels(self):
        with FakeTensorMode():
            fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors(device="cpu")]
            out = moe(*fake, self.routing)
            self.assertEqual((out.shape, out.dtype, out.device), (fake[0].shape, torch.bfloat16, fake[0].device))
            ids = torch.empty(5, 2, dtype=torch.int32, device="cuda")
            out = experts(fake[0], ids, torch.empty(5, 2, device="cuda"), *fake[2:])
            self.assertEqual((out.shape, out.dtype), (fake[0].shape, torch.bfloat16))

    def test_tracing_sees_one_operation(self):
        def block(x, logits, gate_up, down):
            return x + moe(x, logits, gate_up, down, Routing(8, 2))

        traced = make_fx(block, tracing_mode="symbolic")(*tensors(device="cpu"))
        names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
        self.assertIn("anabranch.moe.default", names)


@needs_gpu
class OnGpu(unittest.TestCase):
    def setUp(self):
        self.assertTrue(HAS_GPU, "a GPU is required, and PyTorch finds none")

    def assert_close(self, out, expected):
        self.assertEqual(out.dtype, torch.bfloat16)
        error = relative_error(out, expected)
        self.assertLess(error, TOLERANCE)

    def test_rules_against_the_reference(self):
        cases = [
            (Routing(8, 2, renormalize="sum"), dict(tokens=1)),
            (Routing(8, 2, score="topk_softmax"), dict(tokens=33, hidden=72, width=40)),
            (Routing(64, 6, n_group=8, topk_group=3, scale=16.0), dict(tokens=130, num_experts=64)),
            (
                Routing(
                    64,
                    8,
                    score="sigmoid",
                    renormalize="sum",
                    scale=2.5,
                    n_group=8,
                    topk_group=4,
                    group_score="top2_sum",
                ),
                dict(tokens=257, hidden=256, width=128, num_experts=64, num_shared=1),
            ),
            (Routing(128, 8, renormalize="sum"), dict(tokens=2048, hidden=512, width=256, num_experts=128)),
        ]
        for arch in ("auto", "sm80"):
            for routing, sizes in cases:
                with self.subTest(arch=arch, routing=routing, **sizes):
                    x, logits, gate_up, down = tensors(**sizes)
                    shared = sizes.get("num_shared", 0)
                    bias = gate = None
                    if routing.score == "sigmoid":
                        bias = noise(routing.num_experts, seed=9, size=0.1, dtype=torch.float32)
                    if shared:
                        gate = noise(len(x), seed=10, dtype=torch.float32)
                    out = moe(
                        x,
                        logits,
                        gate_up,
                        down,
                        routing,
                        selection_bias=bias,
                        num_shared=shared,
                        shared_gate=gate,
                        arch=arch,
                    )
                    ids, weights = route(routing, logits, bias)
                    self.assert_close(out, layer(x, ids, weights, gate_up, down, shared, gate))

    def test_experts_given_with_ids_that_are_none(self):
        x, _, gate_up, down = tensors(tokens=40)
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(-1, 10, (40, 3), generator=generator, dtype=torch.int32).cuda()
        weights = noise(40, 3, seed=4, dtype=torch.float32)
        self.assert_close(experts(x, ids, weights, gate_up, down), layer(x, ids, weights, gate_up, down))

    def test_no_tokens(self):
        x, logits, gate_up, down = tensors(tokens=5)
        self.assertEqual(moe(x[:0], logits[:0], gate_up, down, Routing(8, 2)).shape, (0, 64))

    def test_the_same_call_gives_the_same_bits(self):
        arguments = (*tensors(tokens=300, hidden=256, width=128), Routing(8, 2))
        first = moe(*arguments)
        for _ in range(3):
            self.assertTrue(torch.equal(moe(*arguments), first))

    def test_a_row_that_is_not_aligned(self):
        x, logits, gate_up, down = tensors()
        askew = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x)
        with self.assertRaisesRegex(ValueError, "x to 16 bytes"):
            moe(askew, logits, gate_up, down, Routing(8, 2))

    def test_sizes_that_have_no_kernel(self):
        with self.assertRaisesRegex(ValueError, "hidden_size"):
            moe(*tensors(hidden=60), Routing(8, 2))

    def test_nothing_is_copied(self):
        arguments = (*tensors(tokens=64, hidden=1024, width=512), Routing(8, 2))
        out = moe(*arguments)
        weights = arguments[2].nbytes
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        moe(*arguments)
        grown = torch.cuda.max_memory_allocated() - before
        self.assertLess(grown, out.nbytes + 4 * 64 * 2 * (1024 + 512) * 2)
        self.assertLess(grown, weights)

    def test_the_current_stream(self):
        x, logits, gate_up, down = tensors(tokens=64, hidden=256, width=128)
        ids, weights = route(Routing(8, 2), logits)
        expected = layer(x, ids, weights, gate_up, down)
        late = torch.zeros_like(x)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # x arrives on this stream after a while: a launch on any other would see zeros.
            torch.cuda._sleep(20_000_000)
            late.copy_(x)
            out = moe(late, logits, gate_up, down, Routing(8, 2))
        stream.synchronize()
        self.assert_close(out, expected)

    def test_a_graph_is_replayed_with_other_data(self):
        routing = Routing(8, 2, renormalize="sum")
        x, logits, gate_up, down = tensors(tokens=33, hidden=256, width=128)
        moe(x, logits, gate_up, down, routing)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moe(x, logits, gate_up, down, routing)
        for seed in (20, 30):
            fresh = tensors(tokens=33, hidden=256, width=128, seed=seed)
            x.copy_(fresh[0])
            logits.copy_(fresh[1])
            graph.replay()
            torch.cuda.synchronize()
            ids, weights = route(routing, logits)
            self.assert_close(out, layer(x, ids, weights, gate_up, down))

    @unittest.skipUnless(shutil.which("gcc") or shutil.which("cc"), "torch.compile needs a C compiler")
    def test_compiled(self):
        routing = Routing(8, 2, renormalize="sum")

        def block(x, logits, gate_up, down):
            return x + 2 * moe(x, logits, gate_up, down, routing)

        for mode in ("default", "reduce-overhead"):
            compiled = torch.compile(block, fullgraph=True, mode=mode)
            for tokens in (7, 33):
                arguments = tensors(tokens=tokens, hidden=256, width=128)
                expected = block(*arguments)
                for _ in range(3):
                    out = compiled(*arguments)
                with self.subTest(mode=mode, tokens=tokens):
                    self.assertLess(relative_error(out, expected), 1e-2)

    def test_torch_checks_the_operations(self):
        x, logits, gate_up, down = tensors()
        rule = (8, 2, "softmax", "sum", 1.0, 0, 0, "max", "fixed", 0, 0, "auto")
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.anabranch.moe.default, (x, logits, gate_up, down, None, None, *rule), test_utils=checks
        )
        ids = torch.zeros(5, 2, dtype=torch.int32, device="cuda")
        weights = torch.ones(5, 2, device="cuda")
        torch.library.opcheck(
            torch.ops.anabranch.experts.default, (x, ids, weights, gate_up, down, None, 0, "auto"), test_utils=checks
        )

    def test_backward_is_refused(self):
        x, logits, gate_up, down = tensors()
        out = moe(x.requires_grad_(), logits, gate_up, down, Routing(8, 2))
        with self.assertRaisesRegex(NotImplementedError, "no backward pass"):
            out.sum().backward()

    def test_threads_share_a_plan(self):
        arguments = (*tensors(tokens=64, hidden=256, width=128), Routing(8, 2))
        expected, wrong = moe(*arguments), []
        torch.cuda.synchronize()

        def run():
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    out = moe(*arguments)
                    torch.cuda.current_stream().synchronize()
                    if not torch.equal(out, expected):
                        wrong.append(out)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_a_plan_in_words(self):
        text = describe(64, 256, 128, Routing(8, 2))
        self.assertIn("2 of 8 experts, hidden 256, width 128, 64 tokens", text)

    def test_tensors_of_two_gpus(self):
        if torch.cuda.device_count() < 2:
            self.skipTest("one GPU")
        x, logits, gate_up, down = tensors()
        with self.assertRaisesRegex(ValueError, "down must be on cuda:0 as x is"):
            moe(x, logits, gate_up, down.to("cuda:1"), Routing(8, 2))
        ids, weights = route(Routing(8, 2), logits)
        out = moe(*(tensor.to("cuda:1") for tensor in (x, logits, gate_up, down)), Routing(8, 2))
        self.assert_close(out.cpu(), layer(x, ids, weights, gate_up, down).cpu())


if __name__ == "__main__":
    unittest.main()
