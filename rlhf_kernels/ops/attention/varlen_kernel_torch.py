"""attention_varlen by a call of PyTorch's attention for every sequence; on a GPU it waits for cu_seqlens."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from rlhf_kernels.ops.attention import kernel_torch, varlen_reference
from rlhf_kernels.ops.rotary import RotaryTable, rotary
from rlhf_kernels.runtime.library import recomputed

DIFFERENTIABLE = True


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp where asked for (else 0)."""
    *options, q_cos, q_sin, k_cos, k_sin = options
    if q_cos is not None:
        # All at once: a call for each sequence costs as much as its attention.
        q, k = _turned(q, RotaryTable(q_cos, q_sin)), _turned(k, RotaryTable(k_cos, k_sin))
    return varlen_reference.by_sequence(kernel_torch.forward, q, k, v, *options, *[None] * 4)


def _turned(x: Tensor, table: RotaryTable) -> Tensor:
    return rotary(x.transpose(0, 1), table).transpose(0, 1)


def backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, where the operator is opaque to autograd."""
    grad_out, grad_lse, q, k, v, _, _, *options = args
    found = recomputed(lambda *x: forward(*x, *options), (q, k, v), (grad_out, grad_lse))  # not for tables
    return tuple(grad.contiguous() for grad in found)


attention_varlen = partial(varlen_reference.attention_varlen, attend=kernel_torch.plain_forward)
