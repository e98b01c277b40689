"""The C library from Python: its structures as the header has them, and a routing's refusals. No GPU, no PyTorch."""

import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import anabranch
from anabranch import Routing, _library

WORKSPACE = Path(__file__).parents[2] / "Cargo.toml"

HEADER = Path(
    os.environ.get("ANABRANCH_HEADER", Path(__file__).parents[2] / "kernels" / "include" / "anabranch.h")
)
STRUCTURES = {
    "AnabranchRouting": _library.RoutingStruct,
    "AnabranchMoeShape": _library.MoeShapeStruct,
    "AnabranchForwardParams": _library.ForwardParamsStruct,
}
NUMBERS = {
    "ANABRANCH_ABI_VERSION": _library.ABI_VERSION,
    "ANABRANCH_STATUS_POINTER": _library.POINTER_ERROR,
    "ANABRANCH_STATUS_ALIGNMENT": _library.ALIGNMENT,
    "ANABRANCH_STATUS_SETTING": _library.SETTING,
    "ANABRANCH_STATUS_WORKSPACE": _library.WORKSPACE,
    "ANABRANCH_STATUS_UNSUPPORTED": _library.UNSUPPORTED,
    "ANABRANCH_STATUS_PLACE": _library.PLACE,
    **{f"ANABRANCH_SCORE_{word.upper()}": number for word, number in _library.SCORES.items()},
    **{f"ANABRANCH_RENORMALIZE_{word.upper()}": number for word, number in _library.RENORMALIZE.items()},
    **{f"ANABRANCH_GROUP_SCORE_{word.upper()}": number for word, number in _library.GROUP_SCORES.items()},
    **{f"ANABRANCH_ADAPTIVE_{word.upper()}": number for word, number in _library.ADAPTIVE.items()},
    **{f"ANABRANCH_ARCH_{word.upper()}": number for word, number in _library.ARCHS.items()},
}


class Header(unittest.TestCase):
    @unittest.skipUnless(HEADER.is_file() and shutil.which("gcc"), "needs anabranch.h and gcc")
    def test_structures_and_numbers_are_those_of_the_header(self):
        lines, expected = [], []
        for name, struct in STRUCTURES.items():
            lines.append(f"sizeof({name})")
            expected.append(_library.ctypes.sizeof(struct))
            for field, _ in struct._fields_:
                lines.append(f"offsetof({name}, {field})")
                expected.append(getattr(struct, field).offset)
        for name, number in NUMBERS.items():
            lines.append(name)
            expected.append(number)
        prints = "".join(f'  printf("%ld\\n", (long){line});\n' for line in lines)
        source = f"#include <anabranch.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {{\n{prints}}}\n"
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "layout.c").write_text(source)
            program = str(Path(folder) / "layout")
            subprocess.run(["gcc", f"-I{HEADER.parent}", f"{program}.c", "-o", program], check=True)
            output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        got = [int(line) for line in output.split()]
        self.assertEqual(dict(zip(lines, got)), dict(zip(lines, expected)))


class Version(unittest.TestCase):
    @unittest.skipUnless(WORKSPACE.is_file(), "not in a checkout")
    def test_it_is_the_workspaces(self):
        self.assertIn(f'[workspace.package]\nversion = "{anabranch.__version__}"', WORKSPACE.read_text())


class Rules(unittest.TestCase):
    def test_published_rules_are_accepted(self):
        Routing(8, 2, renormalize="sum")
        Routing(64, 6, n_group=8, topk_group=3, scale=16.0)
        Routing(
            256, 8, score="sigmoid", renormalize="sum", scale=2.5, n_group=8, topk_group=4, group_score="top2_sum"
        )
        Routing(16, 4, score="topk_softmax", adaptive="entropy", expert_capacity=10)

    def test_contradictions_are_refused_in_words(self):
        for arguments, words in [
            (dict(num_experts=8, topk=9), "topk must be 1 to 8 with 8 experts, got 9"),
            (dict(num_experts=2000, topk=1), "num_experts must be 1 to 1024"),
            (dict(num_experts=8, topk=2, scale=0.0), "scale must be finite and positive"),
            (dict(num_experts=8, topk=2, n_group=3, topk_group=1), "n_group must be a divisor of 8"),
            (dict(num_experts=8, topk=2, score="tanh"), "score must be one of softmax"),
            (dict(num_experts=8, topk=2, adaptive="complexity"), "adaptive must be fixed or entropy"),
            (dict(num_experts=8, topk=-1), "topk must be 0 to"),
        ]:
            with self.subTest(arguments), self.assertRaises(ValueError) as caught:
                Routing(**arguments)
            self.assertIn(words, str(caught.exception))
        with self.assertRaisesRegex(TypeError, "topk must be an int"):
            Routing(8, 2.0)


if __name__ == "__main__":
    unittest.main()
