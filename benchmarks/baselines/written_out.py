"""rms_norm as models without a fused one write it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32 throughout, rounded at the end."""
    rows = x.float() if x.dtype != torch.float64 else x
    return (rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
