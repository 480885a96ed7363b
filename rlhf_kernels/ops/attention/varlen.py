"""Attention of packed sequences: rows one after the other, without padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.attention.arguments import TABLES, check_heads, checked_options
from rlhf_kernels.ops.rotary import RotaryTables
from rlhf_kernels.runtime.checks import on, readable
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

_OP = Op(
    "attention_varlen",
    "rlhf_kernels.ops.attention",
    {"cpu": ("torch",), "cuda": ("triton", "torch")},
    modules={
        "reference": "varlen_reference",
        "torch": "varlen_kernel_torch",
        "triton": "varlen_kernel_triton",
    },
)
_NAME = "attention_varlen"


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(heads, rows, dtype=dtype)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, *ctx.options = inputs[:-4]
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k, *inputs[-4:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, backward: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, cu_seqlens, cu_seqlens_k, *tables = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    args = (grad_out, grad_lse, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, *ctx.options, *tables)
    return *backward(*args), *[None] * 11


def _replay(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    q, k, v, _, _, *options = args
    return (q, k, v, *options), (grad_out, grad_lse)


_OPTIONS = (
    "Tensor cu_seqlens, Tensor? cu_seqlens_k, bool causal, float scale, bool return_lse, SymInt? window, "
    f"float? softcap, {TABLES}"
)
_varlen = Operator(
    _OP,
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _fake,
    backward_schema="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    backward_fake=_backward_fake,
    setup_context=_setup,
    gradients=_gradients,
    replay=_replay,
    wrt=(0, 1, 2),
    shape_class=lambda q, *_: q.shape[-1],
).call


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    rotary: RotaryTables | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of each of n sequences whose rows are packed one after the other: no work for padding.

    Sequence i has the rows cu_seqlens[i] to cu_seqlens[i + 1]. Rows behind the last sequence give 0, and
    their gradient is 0. A sequence's bits do not depend on the others.

    Args:
        q: [N, H, D].
        k, v: [M, G, D], same dtype and device, H a multiple of G; M = N without `cu_seqlens_k`.
        cu_seqlens: [n + 1] int32 or int64 on the same device: 0, and where each sequence ends. On a GPU its
            numbers are not looked at from Python, so that nothing waits; they must not fall.
        cu_seqlens_k: the same for the keys, where a sequence has another number of keys than of queries.
        causal, scale, window, softcap: as in `attention`, for each sequence.
        rotary: as in `attention`: tables [N, D/2] and [M, D/2], of each row's position in its sequence. Heads
            above 64 are turned in memory, and all on Blackwell.
        return_lse: whether to return the log-sum-exp of each row's scores too.

    Returns:
        [N, H, D] in q's dtype, contiguous; with `return_lse` also [H, N] in float32 (float64 for float64).
        Both carry gradients.

    Raises:
        TypeError: an operand is no floating-point tensor, cu_seqlens are not whole numbers, a number is none.
        ValueError: shapes, dtypes or devices do not fit, cu_seqlens do not rise from 0 (on the CPU), or
            scale, window or softcap is not positive.
    """
    check_heads(_NAME, q, k, v, "[N, H, D]", "[M, G, D]")
    _check_bounds("cu_seqlens", cu_seqlens, q, q.shape[0])
    if cu_seqlens_k is not None:
        _check_bounds("cu_seqlens_k", cu_seqlens_k, q, k.shape[0])
    keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if keys.shape != cu_seqlens.shape or (cu_seqlens_k is None and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"{_NAME}(): every sequence needs its queries and its keys, got q {tuple(q.shape)} in "
            f"{cu_seqlens.numel() - 1} sequences and k {tuple(k.shape)} in {keys.numel() - 1}. "
            "Pass cu_seqlens_k where keys are not queries."
        )
    heads_first = (q.transpose(0, 1), k.transpose(0, 1))
    scale, tables = checked_options(_NAME, *heads_first, scale, window, softcap, rotary)
    args = (cu_seqlens, cu_seqlens_k, causal, scale, return_lse, window, softcap, *tables)
    out, lse = _varlen(q, k, v, *args)
    return (out, lse) if return_lse else out


def _check_bounds(name: str, bounds: Any, q: Tensor, rows: int) -> None:
    """The range is looked at where that is possible: see `checks.readable`."""
    if not isinstance(bounds, Tensor) or bounds.dtype not in (torch.int32, torch.int64):
        got = str(bounds.dtype) if isinstance(bounds, Tensor) else type(bounds).__name__
        raise TypeError(
            f"{_NAME}(): {name} must be a tensor of int32 or int64, got {got}. "
            "Make it of the lengths: F.pad(lengths.cumsum(0), (1, 0))."
        )
    if bounds.dim() != 1 or bounds.numel() == 0:
        raise ValueError(f"{_NAME}(): {name} must be [n + 1] for n sequences, got {tuple(bounds.shape)}")
    on(_NAME, "q", q, name, bounds)
    if not readable(bounds):
        return
    if bounds[0] != 0 or bounds[-1] > rows or (bounds.diff() < 0).any():
        raise ValueError(
            f"{_NAME}(): {name} must rise from 0 to at most {rows} rows, got {bounds.tolist()[:8]}. "
            "Make it of the lengths: F.pad(lengths.cumsum(0), (1, 0))."
        )
