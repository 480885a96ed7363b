"""The definition of decode_attention: attention of one query whose keys are a run of slots.

B batch, H query heads, G key/value heads, C slots, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops.attention import reference


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, starts: Tensor | None, scale: float
) -> Tensor:
    """Row b sees the slots starts[b] <= s < lengths[b]."""
    see = seen(k_cache, lengths, starts)
    out, _ = reference.forward(q, k_cache, v_cache, False, see, scale, False)
    return out


def seen(cache: Tensor, lengths: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """[B, C], which slots a row sees; None where it sees all."""
    if lengths is None and starts is None:
        return None
    batch, _, slots, _ = cache.shape
    slot = torch.arange(slots, device=cache.device)
    see = torch.ones(batch, slots, dtype=torch.bool, device=cache.device)
    if lengths is not None:
        see = see & (slot < lengths[:, None])
    if starts is not None:
        see = see & (slot >= starts[:, None])
    return see


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The definition with the public function's signature."""
    return forward(q, k_cache, v_cache, lengths, starts, q.shape[3] ** -0.5 if scale is None else scale)
