"""The definition of attention_prefix: attention to the prefix and the own keys, side by side in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.attention import reference

DIFFERENTIABLE = True


def side_by_side(
    attend: Callable[..., tuple[Tensor, Tensor]],
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
    """`attend` takes what reference.forward takes; tables are of T and of U + S positions."""
    n = q.shape[0] // prefix_k.shape[0]
    keys, values = (
        torch.cat((prefix.repeat_interleave(n, 0), own), 2) for prefix, own in ((prefix_k, k), (prefix_v, v))
    )
    mask = None
    if key_mask is not None or prefix_mask is not None:
        if prefix_mask is None:
            prefix_mask = key_mask.new_ones(prefix_k.shape[0], prefix_k.shape[2])
        if key_mask is None:
            key_mask = prefix_mask.new_ones(k.shape[0], k.shape[2])
        mask = torch.cat((prefix_mask.repeat_interleave(n, 0), key_mask), 1)
    tables = tuple(t if t is None or t.dim() == 2 else t.repeat_interleave(n, 0) for t in tables)
    return attend(q, keys, values, causal, mask, scale, return_lse, None, None, *tables)


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of each row's scores."""
    return side_by_side(reference.forward, *args)


def attention_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = True,
    key_mask: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    scale: float | None = None,
    rotary: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    return_lse: bool = False,
    attend: Callable[..., tuple[Tensor, Tensor]] = reference.forward,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition with the public function's signature; `attend` as in `side_by_side`."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tables: tuple[Tensor | None, ...] = (None,) * 4
    if rotary is not None:
        tables = (*(t[..., t.shape[-2] - q.shape[2] :, :] for t in rotary[0]), *rotary[1])
    args = (q, k, v, prefix_k, prefix_v, causal, key_mask, prefix_mask, scale, return_lse)
    out, lse = side_by_side(attend, *args, *tables)
    return (out, lse) if return_lse else out
