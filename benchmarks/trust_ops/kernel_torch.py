"""Plain PyTorch."""

import torch

import trust_ops
from rlhf_kernels.ops.swiglu import kernel_torch

DIFFERENTIABLE = False


def forward(x: torch.Tensor, walk: bool, extra: int) -> torch.Tensor:
    """See trust_ops.trust_passes."""
    out, *_ = [kernel_torch.swiglu(block) for block in trust_ops.blocks(x, walk)]
    return out
