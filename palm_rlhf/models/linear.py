"""float32 products on a CPU by oneDNN, through the operators that torch.compile's CPU code calls.

PyTorch's eager product is MKL's, which on AMD's processors leaves a fifth of the rate unused: 90 GFLOP/s
against 109 on one thread at [2048, 512] x [512, 2048]. With few rows it is the reading of the weights that
counts: a cached step of 16 rows through 17 MB of weights takes 3.1 ms by MKL, and 1.6 by oneDNN with
weights in its own layout.

Elsewhere (other dtypes and devices, autocast, torch.compile) this is `F.linear`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows that the packed layout is chosen for.
_ROWS = 16
# A packed weight is a copy: above this many elements the memory counts for more than the time.
_MOST = 1 << 26


@cache
def available() -> bool:
    """Whether this build of PyTorch has oneDNN, and the two operators."""
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def _suits(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and available()
    )


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad
        # A copy of the weight costs little beside the product, which oneDNN would otherwise run slower.
        grad_x = _product(grad, weight.t().contiguous()) if to_x else None
        # Here both operands would have to be copied: MKL takes them as they are.
        return grad_x, grad.flatten(0, -2).t() @ x.flatten(0, -2) if to_weight else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight^T` for x [..., K] and weight [N, K]; differentiable once."""
    if not _suits(x) or weight.dtype != torch.float32:
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight)
    return _product(x, weight)


def pack(weight: Tensor) -> Tensor | None:
    """A copy of a weight [N, K] for `packed_linear`; None where it is better left as it is."""
    if not _suits(weight) or weight.numel() > _MOST:
        return None
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """`x @ weight^T` without a gradient, of a weight that was packed."""
    return _product(x, packed)
