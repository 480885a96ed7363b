"""The definition of layer_norm and rms_norm."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """rows / sqrt(mean(rows^2) + eps) * (weight + weight_offset) + bias, about the mean where `center`.

    The rows are x + residual, as x's dtype holds the sum; the sum is the second result. The third is,
    for a backward, each row's mean (0 where not subtracted), 1 / std, and what rounding the mean left over.
    """
    summed = x.new_empty(0) if residual is None else (x + residual).contiguous()
    rows = (x if residual is None else summed).double()
    mean = rows.mean(-1, keepdim=True) if center else rows.new_zeros((*rows.shape[:-1], 1))
    rows = rows - mean
    scale = (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
    out = rows * scale * (weight.double() + weight_offset)
    dtype = torch.promote_types(x.dtype, torch.float32)
    statistics = torch.cat((mean, scale, 0 * mean), -1).to(dtype).detach()
    if bias is not None:
        out = out + bias.double()
    return out.to(x.dtype, memory_format=torch.contiguous_format), summed, statistics


def layer_norm(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition with the public function's signature."""
    result = forward(x, weight, bias, residual, eps, weight_offset, True)
    return result[0] if residual is None else result[:2]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition with the public function's signature."""
    result = forward(x, weight, None, residual, eps, weight_offset, False)
    return result[0] if residual is None else result[:2]
