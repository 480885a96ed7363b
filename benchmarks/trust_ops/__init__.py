"""An op of a hundred passes over its data and, on demand, some more: known slow-downs for trust.py.

A case says how many more passes, in percent, its kernel makes where TRUST_PLANTED is 1.
"""

import torch

from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

PASSES, LEVELS = 100, (3, 5, 10, 20)


def _like(x, walk, extra):
    rows = x.shape[0] // (PASSES + max(LEVELS)) if walk else x.shape[0]
    return x.new_empty(rows, x.shape[1] // 2)


_op = Op("trust_passes", __name__, {"cpu": ("native", "torch")})
_passes = Operator(_op, "(Tensor x, bool walk, int extra) -> Tensor", _like).call


def trust_passes(x, walk, extra):
    """swiglu of the last block of x[N, 2F] after a hundred passes: where `walk`, over N / 120 rows each, one
    block after another; else over all of x again and again. `extra` is for those that are told to be slow."""
    return _passes(x, walk, extra)


def blocks(x: torch.Tensor, walk: bool, passes: int = PASSES) -> list[torch.Tensor]:
    """What each pass reads, the last block first. A pass more walks through memory of its own: what this call
    has read before would be in a cache."""
    if not walk:
        return [x] * passes
    return list(x.split(x.shape[0] // (PASSES + max(LEVELS))))[::-1][:passes]
