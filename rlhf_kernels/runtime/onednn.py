"""float32 products on a CPU by oneDNN, through the operators that torch.compile's CPU code calls.

PyTorch's eager product is MKL's, which on AMD's processors leaves a fifth of the rate unused: 90 GFLOP/s
against 109 on one thread at [2048, 512] x [512, 2048], and half of it where the inner dimension is short and
the result long: 50 against 90 at [96, 256] x [256, 50257]. With few rows it is the reading of the weights
that counts: a cached step of 16 rows through 17 MB of weights takes 3.1 ms by MKL, and 1.6 by oneDNN with
weights in its own layout.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def available() -> bool:
    """Whether this build of PyTorch has oneDNN, and the two operators."""
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def suits(*operands: Tensor) -> bool:
    """Whether `product` takes them: float32 on the CPU, not empty, no autocast or torch.compile at work."""
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 for x in operands)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and available()
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight^T + bias` for x [..., K] and weight [N, K], `packed` or not; no gradient."""
    if bias is not None:  # whose strides oneDNN does not look at
        bias = bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed(weight: Tensor, rows: int) -> Tensor:
    """A copy of a weight [N, K] in the layout that suits a product with so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
