"""The definition of rotary."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    """Every pair as a vector of the plane, turned by its angle; back by it where `conjugate`."""
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    if cos.dim() == 3:  # [B, T, D/2] beside [B, ..., T, D/2]
        shape = (cos.shape[0],) + (1,) * (x.dim() - 3) + cos.shape[1:]
        cos, sin = cos.reshape(shape), sin.reshape(shape)
    if conjugate:
        sin = -sin
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return out.to(x.dtype)


def rotary(x: Tensor, tables: tuple[Tensor, Tensor], *, interleaved: bool = False) -> Tensor:
    """The definition with the public function's signature."""
    return forward(x, *tables, interleaved, False)
