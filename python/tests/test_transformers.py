"""``anabranch.transformers``: tiny random models of four families, ``eager`` against ``anabranch``, prefill and generation."""

import tempfile
import unittest
from unittest import mock

from support import HAS_GPU, layer, needs_gpu, needs_torch, noise, relative_error, torch

try:
    import transformers
except ImportError:
    transformers = None

if transformers is not None:
    from transformers.integrations.moe import ExpertsInterface
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    import anabranch.transformers
    from anabranch.transformers import experts_forward

    anabranch.transformers.register()

needs_transformers = unittest.skipIf(transformers is None, "Transformers is not installed")

SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    # So that logits are apart: with the usual 0.02 everything is near zero and any two tokens tie.
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
LATENT = dict(
    num_key_value_heads=4,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    moe_intermediate_size=32,
    n_shared_experts=1,
    first_k_dense_replace=1,
    num_experts_per_tok=2,
    n_routed_experts=8,
)


def configs():
    """Tiny configurations, by family."""
    return {
        "qwen3_moe": transformers.Qwen3MoeConfig(
            **SIZES,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=16,
            num_experts_per_tok=4,
            norm_topk_prob=True,
        ),
        "mixtral": transformers.MixtralConfig(
            **SIZES, num_key_value_heads=2, intermediate_size=96, num_local_experts=8, num_experts_per_tok=2
        ),
        "deepseek_v2": transformers.DeepseekV2Config(
            **SIZES, **LATENT, intermediate_size=96, topk_method="group_limited_greedy", n_group=4, topk_group=2
        ),
        "deepseek_v3": transformers.DeepseekV3Config(
            **SIZES, **LATENT, intermediate_size=96, n_group=4, topk_group=2, routed_scaling_factor=2.5
        ),
    }


def build(config, device):
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().to(device)


class Replay:
    """Routing of an eager run, given again to another run: what is compared is then the experts, not who wins a tie.

    While ``calls`` are recorded the class's own forward runs; while they are replayed, anabranch's.
    """

    def __init__(self):
        self.calls, self.replayed = [], 0
        ExpertsInterface.register("recorded", self.record)
        ExpertsInterface.register("replayed", self.replay)

    def record(self, module, hidden_states, ids, weights):
        self.calls.append((ids.clone(), weights.clone()))
        return type(module).forward.__wrapped__(module, hidden_states, ids, weights)

    def replay(self, module, hidden_states, ids, weights):
        ids, weights = self.calls[self.replayed]
        self.replayed += 1
        return experts_forward(module, hidden_states, ids, weights)


@needs_torch
@needs_transformers
class Registration(unittest.TestCase):
    """No GPU is needed: what is registered, accepted and refused."""

    def module(self, dtype=None, **changes):
        config = transformers.MixtralConfig(
            hidden_size=16, intermediate_size=32, num_local_experts=4, hidden_act=changes.pop("hidden_act", "silu")
        )
        module = MixtralExperts(config).to(dtype or torch.bfloat16)
        for name, value in changes.items():
            setattr(module, name, value)
        return module

    def refused(self, error, words, module):
        x = torch.zeros(3, 16, dtype=torch.bfloat16)
        with self.assertRaises(error) as caught:
            experts_forward(module, x, torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2))
        self.assertIn(words, str(caught.exception))

    def test_models_take_the_name(self):
        for family, config in configs().items():
            with self.subTest(family):
                model = build(config, "cpu")
                model.set_experts_implementation("anabranch")
                self.assertEqual(model.config._experts_implementation, "anabranch")
                with self.assertRaisesRegex(ValueError, "must be on a CUDA device"):
                    model(torch.zeros(1, 3, dtype=torch.int64))

    def test_experts_of_another_kind_are_refused(self):
        self.refused(NotImplementedError, "with biases, as MixtralExperts", self.module(has_bias=True))
        self.refused(NotImplementedError, "without a gate", self.module(has_gate=False))
        self.refused(NotImplementedError, "transposed", self.module(is_transposed=True))
        self.refused(NotImplementedError, "interleaved", self.module(is_concatenated=False))
        self.refused(NotImplementedError, "norm after", self.module(has_post_expert_norm=True))
        self.refused(NotImplementedError, "activation is GELU", self.module(hidden_act="gelu"))

    def test_a_gate_of_its_own_is_refused(self):
        class Odd(MixtralExperts):
            def _apply_gate(self, gate_up):
                return gate_up

        module = self.module()
        module.__class__ = Odd
        self.refused(NotImplementedError, "gates in a way of its own", module)

    def test_another_dtype_is_refused(self):
        self.refused(TypeError, "load the model with dtype=torch.bfloat16", self.module(dtype=torch.float32))

    def test_fp8_experts_are_refused(self):
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

        with self.assertRaisesRegex(NotImplementedError, "no FP8 experts"):
            ALL_FP8_EXPERTS_FUNCTIONS["anabranch"](None)

    def test_an_old_release_is_refused(self):
        old = mock.patch.object(anabranch.transformers.transformers, "__version__", "5.6.2")
        with old, self.assertRaisesRegex(ImportError, "5.7 or newer, got 5.6.2"):
            anabranch.transformers.register()

    def test_the_replay_of_these_tests_sees_every_layer(self):
        replay = Replay()
        model = build(configs()["mixtral"], "cpu")
        model.set_experts_implementation("recorded")
        model(torch.zeros(1, 5, dtype=torch.int64))
        self.assertEqual([ids.shape for ids, _ in replay.calls], [(5, 2)] * 3)


@needs_transformers
@needs_gpu
class OnGpu(unittest.TestCase):
    def setUp(self):
        self.assertTrue(HAS_GPU, "a GPU is required, and PyTorch finds none")

    @torch.no_grad() if torch is not None else (lambda test: test)
    def test_prefill(self):
        for family, config in configs().items():
            with self.subTest(family):
                replay, model = Replay(), build(config, "cuda")
                generator = torch.Generator().manual_seed(1)
                ids = torch.randint(1, 128, (2, 40), generator=generator).cuda()
                model.set_experts_implementation("recorded")
                eager = model(ids).logits
                model.set_experts_implementation("replayed")
                ours = model(ids).logits
                self.assertEqual(replay.replayed, len(replay.calls))
                # bf16 all the way: eager rounds every expert's part of a sum, anabranch the sum.
                self.assertLess(relative_error(ours, eager), 2e-2)

    @torch.no_grad() if torch is not None else (lambda test: test)
    def test_generate(self):
        for family, config in configs().items():
            with self.subTest(family):
                replay, model = Replay(), build(config, "cuda")
                prompt = torch.randint(1, 128, (1, 12), generator=torch.Generator().manual_seed(2)).cuda()
                options = dict(
                    max_new_tokens=16, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
                model.set_experts_implementation("recorded")
                eager = model.generate(prompt, **options)
                moe_layers = len(replay.calls) // 16
                model.set_experts_implementation("replayed")
                ours = model.generate(prompt, **options)
                self.assertEqual(replay.replayed, 16 * moe_layers)
                for step, (left, right) in enumerate(zip(eager.logits, ours.logits)):
                    self.assertLess(relative_error(right, left), 3e-2, f"step {step}")
                    if left.argmax() != right.argmax():
                        # Only what ties within the error may differ; from there on the texts do.
                        gap = left.max() - left.flatten()[right.argmax()]
                        self.assertLess(gap.item(), 0.1 * left.std().item())
                        break
                # And with its own router, as a user would.
                model.set_experts_implementation("anabranch")
                self.assertEqual(model.generate(prompt, max_new_tokens=16, do_sample=False).shape, (1, 28))

    def test_sentinels_of_expert_parallelism_are_skipped(self):
        config = transformers.MixtralConfig(hidden_size=64, intermediate_size=32, num_local_experts=4)
        module = MixtralExperts(config).to(torch.bfloat16).cuda()
        with torch.no_grad():
            module.gate_up_proj.copy_(noise(4, 64, 64, seed=1, size=0.1))
            module.down_proj.copy_(noise(4, 64, 32, seed=2, size=0.1))
            x, weights = noise(9, 64, seed=3), noise(9, 2, seed=4).abs()
            ids = torch.randint(0, 5, (9, 2), generator=torch.Generator().manual_seed(5)).cuda()
            out = experts_forward(module, x, ids, weights)
            expected = layer(x, ids, weights.float(), module.gate_up_proj, module.down_proj)
        self.assertLess(relative_error(out, expected), 5e-3)

    @torch.no_grad() if torch is not None else (lambda test: test)
    def test_from_pretrained(self):
        with tempfile.TemporaryDirectory() as folder:
            build(configs()["qwen3_moe"], "cpu").save_pretrained(folder)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, experts_implementation="anabranch"
            ).cuda()
            self.assertTrue(model(torch.ones(1, 5, dtype=torch.int64).cuda()).logits.isfinite().all())


if __name__ == "__main__":
    unittest.main()
