"""masked_normalize over a process group: every rank's moments, pooled in one collective.

Plain PyTorch: what the collective takes leaves nothing for a kernel to win.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_kernels.ops.normalize import kernel_torch
from rlhf_kernels.runtime.groups import gathered, process_group


class _Pooled(torch.autograd.Function):
    """Count, mean and squares of all ranks' elements by Chan's formula, the same bits on each rank."""

    @staticmethod
    def forward(
        ctx: Any, count: Tensor, mean: Tensor, squares: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        mine = torch.stack([count.double(), mean.double(), squares.double()])
        counts, means, parts = gathered(mine, group).unbind(1)
        total = counts.sum(0)
        pooled = (counts * means).sum(0) / total.clamp(min=1)
        ctx.group, ctx.dtype = group, mean.dtype
        ctx.save_for_backward(mine[0] / total.clamp(min=1), mine[0] * (mine[1] - pooled))
        ctx.mark_non_differentiable(total)
        spread = (parts + counts * (means - pooled).square()).sum(0)
        return total, pooled.to(mean.dtype), spread.to(mean.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor, grad_mean: Tensor, grad_squares: Tensor) -> tuple[Tensor | None, ...]:
        share, moment = ctx.saved_tensors
        grads = torch.stack([grad_mean, grad_squares]).double()
        dist.all_reduce(grads, group=ctx.group)
        grad_mean, grad_squares = grads
        to_mean = grad_mean * share + 2 * grad_squares * moment
        return None, to_mean.to(ctx.dtype), grad_squares.to(ctx.dtype), None


def forward(
    x: Tensor, mask: Tensor | None, trailing: int, eps: float, flags: int, group: dist.ProcessGroup
) -> Tensor:
    """Normalises by the moments of all ranks; the gradient is that of the sum of the ranks' losses."""
    process_group("masked_normalize", group)
    wide = kernel_torch.upcast(x)
    stats = _Pooled.apply(*kernel_torch.moments(wide, mask, trailing), group)
    return kernel_torch.affine(wide, mask, stats, eps, flags).to(x.dtype)
