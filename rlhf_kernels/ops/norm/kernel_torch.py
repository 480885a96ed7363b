"""layer_norm and rms_norm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
) -> tuple[Tensor, Tensor | None, None]:
    """PyTorch's own normalisation; in float32 as a whole where the weight does not have x's dtype."""
    rows = (x if residual is None else x + residual).contiguous()
    summed = None if residual is None else rows
    # 1 + gamma does not fit into 16 bits, and CUDA's layer_norm takes parameters of x's dtype only.
    if weight_offset or weight.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, weight = rows.to(dtype), weight.to(dtype) + weight_offset
        bias = None if bias is None else bias.to(dtype)
    if center:
        out = F.layer_norm(rows, weight.shape, weight, bias, eps)
    else:
        out = F.rms_norm(rows, weight.shape, weight, eps)
    return out.to(x.dtype), summed, None  # no statistics: autograd keeps PyTorch's own


def layer_norm(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The plain form with the public function's signature."""
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
    """The plain form with the public function's signature."""
    result = forward(x, weight, None, residual, eps, weight_offset, False)
    return result[0] if residual is None else result[:2]
