"""The definition of attention_varlen: attention of each sequence by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.attention import reference

DIFFERENTIABLE = True


def by_sequence(
    attend: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    return_lse: bool,
    window: int | None,
    softcap: float | None,
    *tables: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[N, H, D] and [H, N], one sequence at a time; `attend` takes what reference.forward takes."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    bounds = cu_seqlens.tolist()
    bounds_k = bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, logs = [], []
    # Split, not sliced: the gradient of a slice is a tensor as large as the whole.
    *queries, behind = q.split(_lengths(bounds, q.shape[2]), 2)
    keys, values = (x.split(_lengths(bounds_k, x.shape[2]), 2) for x in (k, v))
    for i, rows in enumerate(zip(queries, keys, values)):
        a, b, c, d = *bounds[i : i + 2], *bounds_k[i : i + 2]
        own = [None if t is None else t[a:b] for t in tables[:2]]
        own += [None if t is None else t[c:d] for t in tables[2:]]
        out, lse = attend(*rows, causal, None, scale, return_lse, window, softcap, *own)
        outs.append(out[0])
        logs.append(lse[0])
    wide = torch.promote_types(q.dtype, torch.float32)
    behind = behind[0]
    outs.append(behind.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0))
    logs.append(behind.new_full(behind.shape[:2], float("-inf"), dtype=wide))
    return torch.cat(outs, 1).transpose(0, 1).contiguous(), torch.cat(logs, 1)


def _lengths(bounds: list[int], rows: int) -> list[int]:
    """Of the sequences, and of what is behind the last."""
    return [b - a for a, b in zip(bounds, [*bounds[1:], rows])]


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each row's scores."""
    return by_sequence(reference.forward, q, k, v, *options)


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
    rotary: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    return_lse: bool = False,
    attend: Callable[..., tuple[Tensor, Tensor]] = reference.forward,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition with the public function's signature; `attend` as in `by_sequence`."""
    tables = (None,) * 4 if rotary is None else (*rotary[0], *rotary[1])
    scale = q.shape[2] ** -0.5 if scale is None else scale
    options = (cu_seqlens, cu_seqlens_k, causal, scale, return_lse, window, softcap, *tables)
    out, lse = by_sequence(attend, q, k, v, *options)
    return (out, lse) if return_lse else out
