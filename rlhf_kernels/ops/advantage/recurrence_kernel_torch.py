"""linear_recurrence in plain PyTorch: gae's scan by doubling."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops.advantage.kernel_torch import scan

DIFFERENTIABLE = True


def forward(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """The initial state is a step of its own; 16-bit inputs are computed in float32."""
    dtype = b.dtype
    if dtype not in (torch.float32, torch.float64):
        a, b = a.float(), b.float()
    if not reverse:
        a, b = a.flip(1), b.flip(1)
    if initial is not None:
        a = torch.nn.functional.pad(a, (0, 1))
        b = torch.cat((b, initial.to(b.dtype)[:, None]), 1)
    y = scan(a, b)
    y = y if initial is None else y[:, :-1]
    # An operator may return neither its input, which one step leaves as it is, nor a part of something.
    y = y.clone(memory_format=torch.contiguous_format) if reverse else y.flip(1)
    return y.to(dtype)


def linear_recurrence(a: Tensor, b: Tensor, *, reverse: bool = True, initial: Tensor | None = None) -> Tensor:
    """The plain form with the public function's signature."""
    return forward(a, b, initial, reverse)
