"""An op of a hundred passes over its data and, on demand, some more: known slow-downs for trust.py.

TRUST_EXTRA is how many more passes, in percent; it is read when the kernel is first called.
"""

import torch

from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

PASSES = 100


def _like(x, walk):
    rows = x.shape[0] // PASSES if walk else x.shape[0]
    return x.new_empty(rows, x.shape[1] // 2)


_op = Op("trust_passes", __name__, {"cpu": ("native", "torch")})
_passes = Operator(_op, "(Tensor x, bool walk) -> Tensor", _like).call


def trust_passes(x, walk):
    """swiglu of the last block of x[N, 2F] after a hundred passes: over N / 100 rows each, one after another,
    where `walk`; else over all of x again and again."""
    return _passes(x, walk)


def blocks(x: torch.Tensor, walk: bool) -> list[torch.Tensor]:
    """What each pass reads, the last one first."""
    return list(x.split(x.shape[0] // PASSES))[::-1] if walk else [x] * PASSES
