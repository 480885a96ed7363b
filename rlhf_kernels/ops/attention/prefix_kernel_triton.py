"""attention_prefix in Triton: attention to the prefix and to the own keys, joined by their log-sum-exps.

The backward needs no parts: weights against the joint log-sum-exp are those of the whole softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.attention.kernel_triton import Options, run_backward, run_forward, unsupported
from rlhf_kernels.ops.attention.layout import new_like
from rlhf_kernels.runtime.launch import cdiv, launch

__all__ = ["backward", "forward", "unsupported"]

JOINED_ROWS = 16
JOIN_WARPS = 4


@triton.jit(do_not_specialize=["rows", "H", "T", "n"])
def join_kernel(
    prefix_out, prefix_lse, own_out, own_lse, out, lse, rows, H, T, n,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The mean of two outputs by the exponentials of their log-sum-exps; rows are [B, T, H]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    batch, t, h = row // (T * H), row // H % T, row % H
    own = (batch * H + h) * T + t
    first = tl.load(prefix_lse + ((batch // n * H + h) * n + batch % n) * T + t, mask=inside, other=0.0)
    second = tl.load(own_lse + own, mask=inside, other=0.0)
    top = tl.maximum(first, second)
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)
    first, second = tl.exp(first - top), tl.exp(second - top)
    total = tl.where(empty, 1.0, first + second)
    tl.store(lse + own, tl.where(empty, float("-inf"), top + tl.log(total)), mask=inside)
    columns = tl.arange(0, WIDTH)[None, :]
    there = inside[:, None] & (columns < D)
    at = row[:, None] * D + columns
    a = tl.load(prefix_out + at, mask=there, other=0.0).to(tl.float32)
    b = tl.load(own_out + at, mask=there, other=0.0).to(tl.float32)
    joint = a * (first / total)[:, None] + b * (second / total)[:, None]
    tl.store(out + at, joint.to(out.dtype.element_ty), mask=there)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    prefix_mask: Tensor | None,
    scale: float,
    return_lse: bool,
    *tables: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp, which the backward needs in any case."""
    prefixes, (batch, heads, steps, size) = prefix_k.shape[0], q.shape
    shared, own = _tables(tables, batch // prefixes, prefix_k.shape[2])
    common = Options(False, prefix_mask, scale, True, None, None, *shared)
    prefix_out, prefix_lse = run_forward(_together(q, prefixes), prefix_k, prefix_v, common)
    own_out, own_lse = run_forward(q, k, v, Options(causal, key_mask, scale, True, None, None, *own))
    out, lse, rows = new_like(q), torch.empty_like(own_lse), batch * heads * steps
    launch(
        join_kernel, (cdiv(rows, JOINED_ROWS),), q,
        prefix_out, prefix_lse, own_out, own_lse, out, lse, rows, heads, steps, batch // prefixes,
        ROWS=JOINED_ROWS, D=size, WIDTH=triton.next_power_of_2(size), num_warps=JOIN_WARPS,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    prefix_mask: Tensor | None,
    scale: float,
    return_lse: bool,
    *tables: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, prefix_k and prefix_v."""
    rows, prefixes = q.shape[0], prefix_k.shape[0]
    shared, mine = _tables(tables, rows // prefixes, prefix_k.shape[2])
    own = Options(causal, key_mask, scale, return_lse, None, None, *mine)
    dq, dk, dv = run_backward(grad_out, grad_lse, q, k, v, out, lse, own)
    grad_out, q, out, lse = (_together(x, prefixes) for x in (grad_out, q, out, lse))
    grad_lse = None if grad_lse is None else _together(grad_lse, prefixes)
    common = Options(False, prefix_mask, scale, return_lse, None, None, *shared)
    prefix_dq, *rest = run_backward(grad_out, grad_lse, q, prefix_k, prefix_v, out, lse.contiguous(), common)
    apart = prefix_dq.reshape(prefixes, dq.shape[1], rows // prefixes, *dq.shape[2:]).transpose(1, 2)
    return dq.add_(apart.reshape(dq.shape)), dk, dv, *rest


Tables = tuple[Tensor | None, ...]


def _tables(tables: Tables, n: int, prefix_steps: int) -> tuple[Tables, Tables]:
    """Of cos and sin of T positions and of all keys: those of n rows' queries one after the other and of the
    prefix's keys, and those of each row's own part."""
    if not tables or tables[0] is None:
        return (None,) * 4, (None,) * 4
    queries, keys = tables[:2], tables[2:]
    repeats = (1,) * (queries[0].dim() - 2) + (n, 1)
    shared = (*(t.repeat(repeats) for t in queries), *(t[..., :prefix_steps, :] for t in keys))
    own = (*queries, *(t[..., prefix_steps:, :] for t in keys))
    return shared, tuple(t if t.dim() == 2 else t.repeat_interleave(n, 0) for t in own)


def _together(x: Tensor, prefixes: int) -> Tensor:
    """[B, H, T, ...] as [P, H, n T, ...]: a view where the heads of a step lie side by side."""
    n, (_, heads, steps, *rest) = x.shape[0] // prefixes, x.shape
    apart = x.reshape(prefixes, n, heads, steps, *rest)
    return apart.transpose(1, 2).reshape(prefixes, heads, n * steps, *rest)
