"""The definition of masked_normalize."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def forward(x: Tensor, mask: Tensor | None, trailing: int, eps: float, flags: int) -> Tensor:
    """(x - mean) / std over the real elements of the last `trailing` dimensions."""
    add_eps, unbiased, center, zero_masked = (bool(flags & bit) for bit in (1, 2, 4, 8))
    dims = tuple(range(x.dim() - trailing, x.dim()))
    real = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = real.sum(dims, keepdim=True)
    mean = torch.where(real, x, 0).sum(dims, keepdim=True) / count.clamp(min=1)
    squares = torch.where(real, x - mean, 0).square().sum(dims, keepdim=True)
    var = squares / (count - int(unbiased)).clamp(min=1)
    rstd = (var + eps if add_eps else var.clamp(min=eps)).rsqrt()
    offset = torch.zeros_like(mean) if center else mean

    out = (torch.where(real | x.isfinite(), x, 0) - mean) * rstd + offset
    if zero_masked:
        return torch.where(real, out, 0)
    # A masked slot that is not finite has no say in the gradients of the others.
    alone = (x - mean.detach()) * rstd.detach() + offset.detach()
    return torch.where(real | x.isfinite(), out, alone)


def masked_normalize(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    dim: int | tuple[int, ...] | None = None,
    eps: float = 1e-5,
    eps_mode: str = "clamp",
    unbiased: bool = False,
    center: bool = True,
    zero_masked: bool = False,
) -> Tensor:
    """The definition with the public function's signature, but for `group`."""
    dims = tuple(range(x.dim())) if dim is None else (dim,) if isinstance(dim, int) else dim
    last = tuple(range(-len(dims), 0))
    mask = None if mask is None else mask.movedim(dims, last)
    flags = (eps_mode == "add") + 2 * unbiased + 4 * center + 8 * zero_masked
    out = forward(x.movedim(dims, last), mask, len(dims), eps, flags)
    return out.movedim(last, dims)
