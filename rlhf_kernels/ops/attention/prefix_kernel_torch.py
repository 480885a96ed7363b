"""attention_prefix on PyTorch's own attention, with the prefix once for every row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from rlhf_kernels.ops.attention import kernel_torch, prefix_reference
from rlhf_kernels.ops.attention.layout import heads_inside

DIFFERENTIABLE = True
TRACEABLE = True  # as kernel_torch


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp where asked for (else 0)."""
    return prefix_reference.side_by_side(kernel_torch.forward, *args)


def opaque(*args: Any) -> tuple[Tensor, Tensor]:
    """The same, with what `backward` reads: see kernel_torch.opaque."""
    return prefix_reference.side_by_side(kernel_torch.opaque, *args)


def backward(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, prefix_k and prefix_v, where the operator is opaque to autograd."""
    q, k, v, prefix_k, prefix_v, out, lse, *options = args

    def gradients(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Sequence[Tensor]:
        return kernel_torch.gradients(grad_out, grad_lse, q, k, v, out, lse, *options)

    dq, *both = prefix_reference.side_by_side(gradients, q, k, v, prefix_k, prefix_v, *options)
    prefixes, n = prefix_k.shape[0], q.shape[0] // prefix_k.shape[0]
    shared, own = zip(*(x.split((prefix_k.shape[2], k.shape[2]), 2) for x in both))
    shared = (x.unflatten(0, (prefixes, n)).sum(1) for x in shared)
    return tuple(map(heads_inside, (dq, *own, *shared)))


attention_prefix = partial(prefix_reference.attention_prefix, attend=kernel_torch.plain_forward)
