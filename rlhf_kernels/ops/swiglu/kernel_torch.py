"""swiglu in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

DIFFERENTIABLE = True


def forward(x: Tensor, gate: Tensor | None, gate_first: bool) -> Tensor:
    """silu(gate) * x; two elementwise kernels and a view."""
    if gate is None:
        first, second = x.chunk(2, dim=-1)
        x, gate = (second, first) if gate_first else (first, second)
    return F.silu(gate) * x


def swiglu(x: Tensor, gate: Tensor | None = None, *, gate_first: bool = False) -> Tensor:
    """The plain form with the public function's signature."""
    return forward(x, gate, gate_first)
