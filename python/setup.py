"""Puts the C library into the wheel, and into the source distribution what it is built from.

The library is what ``ANABRANCH_LIBRARY`` names, else ``cargo xtask capi`` builds it, which needs Rust and brings nvcc and libclang where they are
missing. Nothing else is compiled: the wheel fits any Python 3 of its platform.
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.dist import Distribution

HERE = Path(__file__).resolve().parent
# In a source distribution the sources are beside this file, in a checkout this is a folder of them.
SOURCES = HERE / "rust" if (HERE / "rust").is_dir() else HERE.parent
# What the library is built from. Whole folders: cargo looks for every member of the workspace and every target it names.
PARTS = [
    ".cargo",
    "Cargo.toml",
    "Cargo.lock",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "benches",
    "build",
    "crates",
    "kernels",
    "src",
    "tests/gpu",
]
# Data of tests and benches, which no build reads.
LEFT_OUT = shutil.ignore_patterns("results", "golden", "target", "__pycache__", "node_modules")


def library() -> Path:
    """The library to pack."""
    named = os.environ.get("ANABRANCH_LIBRARY")
    if named:
        return Path(named)
    into = HERE / "build" / "capi"
    try:
        subprocess.run(["cargo", "xtask", "capi", str(into)], cwd=SOURCES, check=True)
    except FileNotFoundError:
        raise SystemExit("cargo is missing: install Rust 1.90 or newer, or set ANABRANCH_LIBRARY to a built library") from None
    return into / "lib" / "libanabranch.so.1"


class WithLibrary(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copy(library(), Path(self.build_lib) / "anabranch" / "libanabranch.so")


class Py3NonePlatform(bdist_wheel):
    def get_tag(self) -> "tuple[str, str, str]":
        return ("py3", "none", super().get_tag()[2])


class WithSources(sdist):
    def make_release_tree(self, base_dir: str, files: "list[str]") -> None:
        super().make_release_tree(base_dir, files)
        for part in PARTS:
            start, to = SOURCES / part, Path(base_dir) / "rust" / part
            to.parent.mkdir(parents=True, exist_ok=True)
            if start.is_dir():
                shutil.copytree(start, to, ignore=LEFT_OUT)
            else:
                shutil.copy(start, to)


class Platform(Distribution):
    """A distribution that is not for every platform, although it has no extension modules."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=Platform,
    cmdclass={"bdist_wheel": Py3NonePlatform, "build_py": WithLibrary, "sdist": WithSources},
)
