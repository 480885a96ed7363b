"""How outputs and gradients lie in memory: [B, H, T, D] with the heads of one step side by side.

So the projections around attention want them, and so PyTorch's own fast kernels leave them.
"""

from __future__ import annotations

from torch import Tensor


def heads_inside(x: Tensor) -> Tensor:
    """x in that layout; copies where it is another."""
    by_step = x.transpose(1, 2)
    return x if by_step.is_contiguous() else by_step.contiguous().transpose(1, 2)


def new_like(x: Tensor) -> Tensor:
    """New memory in that layout."""
    batch, heads, steps, size = x.shape
    return x.new_empty(batch, steps, heads, size).transpose(1, 2)


def rows_whole(x: Tensor) -> Tensor:
    """x with a contiguous last dimension; copies where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()
