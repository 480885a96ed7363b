"""The native swiglu kernel, once a block, and where TRUST_PLANTED is 1 for `extra` blocks more."""

import os

import torch

import trust_ops
from rlhf_kernels import swiglu

_PLANTED = os.environ.get("TRUST_PLANTED") == "1"


def forward(x: torch.Tensor, walk: bool, extra: int) -> torch.Tensor:
    """See trust_ops.trust_passes."""
    todo = trust_ops.blocks(x, walk, trust_ops.PASSES + (extra if _PLANTED else 0))
    out = swiglu(todo[0])
    for block in todo[1:]:
        swiglu(block)
    return out
