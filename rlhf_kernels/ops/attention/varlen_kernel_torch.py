"""attention_varlen by a call of PyTorch's attention for every sequence; on a GPU it waits for cu_seqlens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.attention import kernel_torch, varlen_reference
from rlhf_kernels.ops.attention.varlen_reference import apart, lengths_of
from rlhf_kernels.ops.rotary import RotaryTable, rotary, turned_back

DIFFERENTIABLE = True
_NO_TABLES = (None,) * 4


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp where asked for (else 0)."""
    return _attend(kernel_torch.forward, q, k, v, *options)


def opaque(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The same, with what `backward` reads: see kernel_torch.opaque."""
    return _attend(kernel_torch.opaque, q, k, v, *options)


def _attend(attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Any:
    *options, q_cos, q_sin, k_cos, k_sin = options
    if q_cos is not None:
        # All at once: a call for each sequence costs as much as its attention.
        q, k = _by_rows(rotary, q, q_cos, q_sin), _by_rows(rotary, k, k_cos, k_sin)
    return varlen_reference.by_sequence(attend, q, k, v, *options, *_NO_TABLES)


def _by_rows(turn: Callable[[Tensor, RotaryTable], Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return turn(x.transpose(0, 1), RotaryTable(cos, sin)).transpose(0, 1)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, where the operator is opaque to autograd: one sequence at a time."""
    *options, q_cos, q_sin, k_cos, k_sin = options
    if q_cos is not None:
        q, k = _by_rows(rotary, q, q_cos, q_sin), _by_rows(rotary, k, k_cos, k_sin)
    lengths = lengths_of(cu_seqlens, q.shape[0])
    lengths_k = lengths if cu_seqlens_k is None else lengths_of(cu_seqlens_k, k.shape[0])
    queries, keys, values = apart(q, lengths), apart(k, lengths_k), apart(v, lengths_k)
    logs = lse[None].split_with_sizes(lengths, 2)
    log_grads = [None] * len(lengths) if grad_lse is None else grad_lse[None].split_with_sizes(lengths, 2)
    sequences = zip(apart(grad_out, lengths), log_grads, queries, keys, values, apart(out, lengths), logs)
    found = [
        kernel_torch.gradients(*sequence, causal, None, *options, *_NO_TABLES)
        for sequence in list(sequences)[:-1]
    ]
    found.append(tuple(torch.zeros_like(rows[-1]) for rows in (queries, keys, values)))
    dq, dk, dv = map(_joined, (q, k, v), zip(*found))
    if q_cos is not None:
        dq, dk = _by_rows(turned_back, dq, q_cos, q_sin), _by_rows(turned_back, dk, k_cos, k_sin)
    return dq.contiguous(), dk.contiguous(), dv


def _joined(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """The gradient of x from [1, H, T, D] of all its rows."""
    grad = x.new_empty(x.shape)
    torch.cat(parts, 2, out=grad.transpose(0, 1)[None])
    return grad


attention_varlen = partial(varlen_reference.attention_varlen, attend=kernel_torch.plain_forward)
