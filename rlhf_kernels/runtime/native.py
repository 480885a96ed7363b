"""Loads the compiled libraries, or keeps the reason why it cannot.

`_C` holds the CPU kernels as torch operators, `_C_cuda` the CUDA kernels for the same operators, `_host` the
row kernels on NumPy arrays. None is required: `missing(name)` gives one sentence that says why one is absent
and what to do about it.
"""

from __future__ import annotations

import importlib
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # the libraries need torch's own to be loaded first

NAMESPACE = "rlhf_kernels_native"
LIBRARIES = ("_C", "_C_cuda", "_host")
LEVELS = ("base", "v3", "v4", "v4+bf16")  # of RLHF_KERNELS_ISA (csrc/common/isa.h)
_PACKAGE = Path(__file__).parent.parent


class OutdatedError(ImportError):
    """The compiled library is older than the source, and lacks an operator."""


@cache
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    asked = os.environ.get("RLHF_KERNELS_ISA")
    if asked and asked not in LEVELS:  # the library would take the best level without a word
        return None, f"RLHF_KERNELS_ISA is {asked!r}, which is none of {', '.join(LEVELS)}"
    if name == "_C_cuda" and (reason := missing("_C")):
        return None, reason  # the schemas live there
    try:
        return importlib.import_module(f"rlhf_kernels.{name}"), None
    except ModuleNotFoundError:
        return None, _build_reason(
            name
        ) or "not built: run pip install --no-build-isolation -e . with a C++ compiler"
    except ImportError as error:
        first = str(error).splitlines()[0]
        return None, f"found but not loadable ({first}): rebuild it for torch {torch.__version__}"


def _build_reason(name: str) -> str | None:
    """What the build wrote down when it left this library out."""
    try:
        return json.loads((_PACKAGE / "_build.json").read_text())["skipped"].get(name)
    except (OSError, ValueError, KeyError):
        return None


def missing(name: str) -> str | None:
    """Why library `name` cannot be used, or None when it is loaded."""
    return _load(name)[1]


def host() -> ModuleType:
    """The NumPy module, or an ImportError that says why it is absent."""
    module, reason = _load("_host")
    if module is None:
        raise ImportError(f"rlhf_kernels._host is not available: {reason}")
    return module


def overload(name: str) -> Any:
    """A native operator; the caller has checked `missing`.

    Raises:
        OutdatedError: the library has no such operator.
    """
    if reason := missing("_C"):
        raise RuntimeError(f"native kernels are not available: {reason}")
    _load("_C_cuda")
    try:
        return getattr(getattr(torch.ops, NAMESPACE), name).default
    except AttributeError:
        remedy = "rebuild it: pip install --no-build-isolation -e ."
        raise OutdatedError(
            f"the compiled library has no {name}, it is older than this source: {remedy}"
        ) from None


def operator(name: str) -> Any:
    """Its raw callable: OpOverload.__call__ only forwards to `_op`, at 0.2 us a call."""
    found = overload(name)
    return getattr(found, "_op", found)
