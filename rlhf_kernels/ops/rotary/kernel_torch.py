"""rotary in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    """Two products and two fused multiply-adds on halves of the data, and one concatenation."""
    if cos.dim() == 3:
        between = (1,) * (x.dim() - 3)
        cos, sin = (t.view(t.shape[0], *between, *t.shape[1:]) for t in (cos.contiguous(), sin.contiguous()))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    cos, sin = cos.to(wide.dtype), sin.to(wide.dtype)
    sign = -1 if conjugate else 1
    turned = (torch.addcmul(a * cos, b, sin, value=-sign), torch.addcmul(b * cos, a, sin, value=sign))
    out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return out.to(x.dtype)


def rotary(x: Tensor, tables: tuple[Tensor, Tensor], *, interleaved: bool = False) -> Tensor:
    """The plain form with the public function's signature."""
    return forward(x, *tables, interleaved, False)
