"""masked_normalize in plain PyTorch: moments of the real elements, then one affine map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf_kernels.ops.normalize.arguments import (
    ADD_EPS,
    CENTER,
    UNBIASED,
    ZERO_MASKED,
    as_flags,
    moved_back,
    moved_last,
    reduced,
)

DIFFERENTIABLE = True


def upcast(x: Tensor) -> Tensor:
    """x in the type that it is computed in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def moments(x: Tensor, mask: Tensor | None, trailing: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of the real elements; reduced dimensions keep size 1."""
    dims = tuple(range(x.dim() - trailing, x.dim()))
    if mask is None:
        size = math.prod(x.shape[d] for d in dims)
        mean = x.sum(dims, keepdim=True) / max(size, 1)
        squares = (x - mean).square().sum(dims, keepdim=True)
        return torch.full_like(mean, size, dtype=torch.int64), mean, squares
    count = mask.sum(dims, keepdim=True)
    mean = x.masked_fill(~mask, 0).sum(dims, keepdim=True) / count.clamp(min=1)
    return count, mean, (x - mean).masked_fill(~mask, 0).square().sum(dims, keepdim=True)


def affine(
    x: Tensor, mask: Tensor | None, stats: tuple[Tensor, Tensor, Tensor], eps: float, flags: int
) -> Tensor:
    """The normalised tensor from the moments of its real elements."""
    count, mean, squares = stats
    center, zero_masked = flags & CENTER, flags & ZERO_MASKED
    var = squares / (count - (1 if flags & UNBIASED else 0)).clamp(min=1)
    rstd = (var + eps if flags & ADD_EPS else var.clamp(min=eps)).rsqrt()
    if mask is not None and not zero_masked and x.requires_grad and torch.is_grad_enabled():
        # A masked slot that is not finite has no say in the gradients of the others.
        stray = ~(mask | x.isfinite())
        kept = (x.masked_fill(stray, 0) - mean) * rstd
        out = torch.where(stray, (x - mean.detach()) * rstd.detach(), kept)
        return out if center else out + torch.where(stray, mean.detach(), mean)
    hidden = None if mask is None or not zero_masked else ~mask
    out = x - mean
    out = (out if hidden is None else out.masked_fill(hidden, 0)) * rstd
    if center:
        return out
    return out + (mean if hidden is None else mean.masked_fill(hidden, 0))


def forward(x: Tensor, mask: Tensor | None, trailing: int, eps: float, flags: int) -> Tensor:
    """Normalises the last `trailing` dimensions; 16-bit inputs are computed in float32."""
    wide = upcast(x)
    stats = moments(wide, mask, trailing)
    return affine(wide, mask, stats, eps, flags).to(x.dtype)


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
    """The plain form with the public function's signature, but for `group`."""
    dims = reduced(dim, x.dim())
    mask = None if mask is None else moved_last(mask, dims)
    flags = as_flags(eps_mode, unbiased, center, zero_masked)
    out = forward(moved_last(x, dims), mask, len(dims), eps, flags)
    return moved_back(out, dims)
