"""The definition of attention.

B batch, T queries, S keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """`softmax(scale * q k^T) v` and the log-sum-exp of each row's scores."""
    heads, queries = q.shape[1:3]
    groups, keys = k.shape[1:3]
    if key_mask is not None:
        # Excluded, not multiplied by 0: a masked slot may hold NaN.
        unseen = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    k = k.repeat_interleave(heads // groups, dim=1)
    v = v.repeat_interleave(heads // groups, dim=1)

    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-2, -1)).to(wide) * scale
    scores = scores.masked_fill(~seen(queries, keys, causal, key_mask, q.device), float("-inf"))
    top = scores.detach().amax(-1, keepdim=True) if keys else scores.new_zeros(*scores.shape[:-1], 1)
    top = top.masked_fill(top == float("-inf"), 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (top + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    return (weights / total).to(v.dtype) @ v, lse


def seen(queries: int, keys: int, causal: bool, key_mask: Tensor | None, device: torch.device) -> Tensor:
    """Which query sees which key, broadcastable to [B, H, T, S]; causal is aligned to the bottom right."""
    see = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if causal:
        see = see.tril(keys - queries)
    return see if key_mask is None else see & key_mask[:, None, None, :]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition with the public function's signature."""
    out, lse = forward(q, k, v, causal, key_mask, q.shape[3] ** -0.5 if scale is None else scale, return_lse)
    return (out, lse) if return_lse else out
