"""attention_prefix on PyTorch's own attention, with the prefix once for every row."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from rlhf_kernels.ops.attention import kernel_torch, prefix_reference
from rlhf_kernels.ops.attention.layout import heads_inside
from rlhf_kernels.runtime.library import recomputed

DIFFERENTIABLE = True
TRACEABLE = True  # compiled: through an opaque operator the backward would run the forward again


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp where asked for (else 0)."""
    return prefix_reference.side_by_side(kernel_torch.forward, *args)


def backward(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, prefix_k and prefix_v, where the operator is opaque to autograd."""
    rows, options = args[:5], args[7:]
    found = recomputed(lambda *x: forward(*x, *options), rows, (grad_out, grad_lse))  # not for tables
    return tuple(map(heads_inside, found))


attention_prefix = partial(prefix_reference.attention_prefix, attend=kernel_torch.plain_forward)
