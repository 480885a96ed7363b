"""The native swiglu kernel, once a block, and TRUST_EXTRA blocks more."""

import os

import torch

import trust_ops
from rlhf_kernels import swiglu


def forward(x: torch.Tensor, walk: bool) -> torch.Tensor:
    """See trust_ops.trust_passes."""
    todo = trust_ops.blocks(x, walk)
    out = swiglu(todo[0])
    for block in todo[1:] + todo[: int(os.environ.get("TRUST_EXTRA", "0"))]:
        swiglu(block)
    return out
