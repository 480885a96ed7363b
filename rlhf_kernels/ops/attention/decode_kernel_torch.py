"""decode_attention on `F.scaled_dot_product_attention`: the heads that share a key head are its queries."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels.ops.attention import kernel_torch
from rlhf_kernels.ops.attention.decode_reference import seen


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, starts: Tensor | None, scale: float
) -> Tensor:
    """Keys and values are read once for all heads; unseen slots are cleared in a copy of the cache."""
    batch, heads, _, size = q.shape
    groups = k_cache.shape[1]
    queries = q.reshape(batch, groups, heads // groups, size)
    see = seen(k_cache, lengths, starts)
    out, _ = kernel_torch.forward(queries, k_cache, v_cache, False, see, scale, False)
    return out.reshape(q.shape).contiguous()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The plain form with the public function's signature."""
    return forward(q, k_cache, v_cache, lengths, starts, q.shape[3] ** -0.5 if scale is None else scale)
