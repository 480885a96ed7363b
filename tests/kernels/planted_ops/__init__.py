"""Two ops for test_engine.py and test_cli.py, one of them wrong. Not a test: workers import it."""

import torch

from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

_ORDER = {"cpu": ("native", "torch")}
_SCHEMA = "(Tensor x) -> Tensor"

_double = Operator(Op("planted_double", __name__, _ORDER), _SCHEMA, torch.empty_like).call
_wrong = Operator(
    Op("planted_wrong", __name__, _ORDER, {"native": "kernel_wrong"}), _SCHEMA, torch.empty_like
).call


def planted_double(x):
    """2 x."""
    return _double(x)


def planted_wrong(x):
    """2 x, but for a native kernel that forgets the last column."""
    return _wrong(x)
