"""The definition of attention.

B batch, T queries, S keys, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops.rotary.reference import forward as turned

DIFFERENTIABLE = True


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    return_lse: bool,
    window: int | None = None,
    softcap: float | None = None,
    q_cos: Tensor | None = None,
    q_sin: Tensor | None = None,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(scale * q k^T) v` and the log-sum-exp of each row's scores."""
    heads, queries = q.shape[1:3]
    groups, keys = k.shape[1:3]
    if key_mask is not None:
        # Excluded, not multiplied by 0: a masked slot may hold NaN.
        unseen = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    if q_cos is not None:
        q, k = turned(q, q_cos, q_sin, False, False), turned(k, k_cos, k_sin, False, False)
    k = k.repeat_interleave(heads // groups, dim=1)
    v = v.repeat_interleave(heads // groups, dim=1)

    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-2, -1)).to(wide) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    see = seen(queries, keys, causal, window, key_mask, q.device)
    scores = scores.masked_fill(~see, float("-inf"))
    top = scores.detach().amax(-1, keepdim=True) if keys else scores.new_zeros(*scores.shape[:-1], 1)
    top = top.masked_fill(top == float("-inf"), 0)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    lse = (top + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    return (weights / total).to(v.dtype) @ v, lse


def seen(
    queries: int, keys: int, causal: bool, window: int | None, key_mask: Tensor | None, device: torch.device
) -> Tensor:
    """Which query sees which key, broadcastable to [B, H, T, S]; the last query's place is the last key's."""
    ahead = (
        torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - (keys - queries)
    )
    see = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if causal:
        see = see & (ahead <= 0)
    if window is not None:
        see = see & (ahead.abs() < window)
    return see if key_mask is None else see & key_mask[:, None, None, :]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    rotary: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition with the public function's signature."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tables = (None,) * 4 if rotary is None else (*rotary[0], *rotary[1])
    out, lse = forward(q, k, v, causal, key_mask, scale, return_lse, window, softcap, *tables)
    return (out, lse) if return_lse else out
