"""The C library: found, loaded, and its structures as ctypes has them.

The declarations follow ``anabranch.h``, whose version is compared when the library is loaded; a test compiles the header and compares
every size and offset.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, Structure, c_char, c_char_p, c_float, c_int, c_int32, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import NoReturn

ABI_VERSION = 1

OK = 0
POINTER_ERROR = 1
ALIGNMENT = 2
SETTING = 3
WORKSPACE = 4
UNSUPPORTED = 5
PLACE = 6

SCORES = {"softmax": 0, "sigmoid": 1, "topk_softmax": 2}
RENORMALIZE = {"none": 0, "sum": 1}
GROUP_SCORES = {"max": 0, "top2_sum": 1}
ADAPTIVE = {"fixed": 0, "complexity": 1, "entropy": 2}
ARCHS = {"auto": 0, "sm80": 1, "sm90": 2}


class RoutingStruct(Structure):
    """``AnabranchRouting``."""

    _fields_ = [
        ("num_experts", c_uint32),
        ("topk", c_uint32),
        ("score", c_int),
        ("renormalize", c_int),
        ("scale", c_float),
        ("n_group", c_uint32),
        ("topk_group", c_uint32),
        ("group_score", c_int),
        ("adaptive", c_int),
        ("expert_capacity", c_uint64),
    ]


class MoeShapeStruct(Structure):
    """``AnabranchMoeShape``."""

    _fields_ = [
        ("routing", RoutingStruct),
        ("num_shared", c_uint32),
        ("hidden_size", c_uint32),
        ("intermediate_size", c_uint32),
        ("arch", c_int),
    ]


class ForwardParamsStruct(Structure):
    """``AnabranchForwardParams``."""

    _fields_ = [
        ("num_tokens", c_uint64),
        ("x", c_void_p),
        ("logits", c_void_p),
        ("selection_bias", c_void_p),
        ("shared_gate", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("topk_ids", c_void_p),
        ("topk_weights", c_void_p),
        ("out", c_void_p),
        ("workspace", c_void_p),
        ("workspace_bytes", c_uint64),
        ("check_memory", c_uint32),
    ]


_FUNCTIONS = {
    "anabranch_abi_version": (c_int32, []),
    "anabranch_last_error": (c_char_p, []),
    "anabranch_router_workspace": (c_int, [POINTER(RoutingStruct), c_uint64, POINTER(c_uint64)]),
    "anabranch_plan_create": (c_int, [POINTER(MoeShapeStruct), c_uint64, POINTER(c_void_p)]),
    "anabranch_plan_destroy": (None, [c_void_p]),
    "anabranch_plan_workspace": (c_int, [c_void_p, c_uint64, POINTER(c_uint64)]),
    "anabranch_plan_describe": (c_int, [c_void_p, c_uint64, POINTER(c_char), c_uint64]),
    "anabranch_plan_forward": (c_int, [c_void_p, POINTER(ForwardParamsStruct), c_void_p]),
}


def path() -> Path:
    """Where the library is: what ``ANABRANCH_LIBRARY`` names, else the one that came with this package."""
    named = os.environ.get("ANABRANCH_LIBRARY")
    return Path(named) if named else Path(__file__).with_name("libanabranch.so")


def _load() -> ctypes.CDLL:
    where = path()
    try:
        loaded = ctypes.CDLL(str(where))
    except OSError as error:
        raise ImportError(
            f"the C library cannot be loaded from {where} ({error}): install the wheel, or set ANABRANCH_LIBRARY to the "
            "libanabranch.so.1 that `cargo xtask capi` makes"
        ) from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise ImportError(f"{where} has no function {name}: it is not the library of this package")
        function.restype = result
        function.argtypes = arguments
    version = loaded.anabranch_abi_version()
    if version != ABI_VERSION:
        raise ImportError(f"{where} has ABI version {version}, but this package needs {ABI_VERSION}")
    return loaded


LIBRARY = _load()


def check(status: int) -> None:
    """Raises what the library says of a status that is not OK, in Python's form."""
    if status != OK:
        refuse(status)


def refuse(status: int) -> NoReturn:
    """``ValueError`` for what the caller can mend, ``RuntimeError`` for the rest."""
    # Without the C function's name, which is nothing to a caller in Python.
    _, _, message = (LIBRARY.anabranch_last_error() or b"").decode(errors="replace").partition(": ")
    mendable = (POINTER_ERROR, ALIGNMENT, SETTING, WORKSPACE, UNSUPPORTED, PLACE)
    raise (ValueError if status in mendable else RuntimeError)(message)
