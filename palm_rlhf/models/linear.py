"""Linear layers by `rlhf_kernels.runtime.onednn` where it suits, and elsewhere by `F.linear`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_kernels.runtime.onednn import packed, product, suits

# Rows that the packed layout is chosen for.
_ROWS = 16
# A packed weight is a copy: above this many elements the memory counts for more than the time.
_MOST = 1 << 26


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad
        # A copy of the weight costs little beside the product, which oneDNN would otherwise run slower.
        grad_x = product(grad, weight.t().contiguous()) if to_x else None
        # Here both operands would have to be copied: MKL takes them as they are.
        return grad_x, grad.flatten(0, -2).t() @ x.flatten(0, -2) if to_weight else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight^T` for x [..., K] and weight [N, K]; differentiable once."""
    if not suits(x, weight):
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight)
    return product(x, weight)


def pack(weight: Tensor) -> Tensor | None:
    """A copy of a weight [N, K] for `packed_linear`; None where it is better left as it is."""
    if not suits(weight) or weight.numel() > _MOST:
        return None
    return packed(weight, _ROWS)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight^T + bias` without a gradient, of a weight that was packed."""
    return product(x, packed, bias)
