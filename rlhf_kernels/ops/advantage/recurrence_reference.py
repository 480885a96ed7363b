"""The definition of linear_recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def forward(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """One step after the other."""
    rows, steps = b.shape
    state = b.new_zeros(rows) if initial is None else initial
    found = [state] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        found[t] = state = a[:, t] * state + b[:, t]
    return torch.stack(found, 1) if steps else b.clone()


def linear_recurrence(a: Tensor, b: Tensor, *, reverse: bool = True, initial: Tensor | None = None) -> Tensor:
    """The definition with the public function's signature."""
    return forward(a, b, initial, reverse)
