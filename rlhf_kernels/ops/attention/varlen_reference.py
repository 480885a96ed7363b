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
    lengths = lengths_of(cu_seqlens, q.shape[0])
    lengths_k = lengths if cu_seqlens_k is None else lengths_of(cu_seqlens_k, k.shape[0])
    *queries, behind = apart(q, lengths)
    own = [
        [None] * len(lengths) if t is None else t.split(n)
        for t, n in zip(tables, (lengths, lengths, lengths_k, lengths_k))
    ]
    outs, logs = [], []
    for rows in zip(queries, apart(k, lengths_k), apart(v, lengths_k), *own):
        out, lse = attend(*rows[:3], causal, None, scale, return_lse, window, softcap, *rows[3:])
        outs.append(out[0].transpose(0, 1))
        logs.append(lse[0])
    wide = torch.promote_types(q.dtype, torch.float32)
    if behind.shape[2] or not outs:
        behind = behind[0].transpose(0, 1)
        outs.append(behind.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0))
        logs.append(behind.new_full((q.shape[1], behind.shape[0]), float("-inf"), dtype=wide))
    return torch.cat(outs), torch.cat(logs, 1)


def lengths_of(cu_seqlens: Tensor, rows: int) -> list[int]:
    """Of the sequences, and of what is behind the last."""
    bounds = cu_seqlens.tolist()
    return [b - a for a, b in zip(bounds, [*bounds[1:], rows])]


def apart(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """[N, H, D] as [1, H, T, D] for each length."""
    # Split, not sliced: the gradient of a slice is a tensor as large as the whole.
    return x.transpose(0, 1)[None].split_with_sizes(lengths, 2)


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
