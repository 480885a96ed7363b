"""The definition of swiglu."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def forward(x: Tensor, gate: Tensor | None, gate_first: bool) -> Tensor:
    """silu(gate) * x, with silu(g) = g / (1 + exp(-g))."""
    if gate is None:
        half = x.shape[-1] // 2
        first, second = x[..., :half], x[..., half:]
        x, gate = (second, first) if gate_first else (first, second)
    return gate / (1 + torch.exp(-gate)) * x


def swiglu(x: Tensor, gate: Tensor | None = None, *, gate_first: bool = False) -> Tensor:
    """The definition with the public function's signature."""
    return forward(x, gate, gate_first)
