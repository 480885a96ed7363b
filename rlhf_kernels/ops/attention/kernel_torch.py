"""Attention on `F.scaled_dot_product_attention`, with the definition's semantics at the edges."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_kernels.ops.attention.layout import heads_inside
from rlhf_kernels.runtime.library import recomputed

DIFFERENTIABLE = True

# Not cuDNN: with a mask its gradients hold NaN (pytorch#196678).
_MASK_SAFE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Tensor | None, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp where asked for (else 0): that takes all scores, once more."""
    queries, keys = q.shape[2], k.shape[2]
    causal = causal and queries > 1  # a single query sees every key
    if key_mask is not None:
        masked = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(masked, 0), v.masked_fill(masked, 0)
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0 or keys == 0:
        nothing = torch.ones((), dtype=torch.bool, device=q.device)
        return heads_inside(q.masked_fill(nothing, 0)), q.new_full(q.shape[:3], float("-inf"), dtype=wide)
    see, empty = None, None
    if key_mask is not None or (causal and queries != keys):
        see, empty = _mask(queries, keys, causal, key_mask, q.device)
    out = _sdpa(q, k, v, see, causal and see is None, scale)
    if empty is not None:
        out = out.masked_fill(empty, 0)
    if return_lse:
        return heads_inside(out), _lse(q.to(wide), k.to(wide), causal, key_mask, scale)
    return heads_inside(out), q.new_zeros(q.shape[:3], dtype=wide)


def backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, where the operator is opaque to autograd."""
    grad_out, grad_lse, q, k, v, _, _, *options = args
    found = recomputed(forward, (q, k, v, *options), (grad_out, grad_lse))
    return tuple(heads_inside(grad) for grad in found[:3])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, see: Tensor | None, causal: bool, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    # Elsewhere grouped heads would fall to the kernel that holds every score.
    native = q.device.type == "cpu" or (see is None and q.dtype != torch.float32)
    if grouped and not native:
        k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    with nullcontext() if see is None or not q.is_cuda else sdpa_kernel(_MASK_SAFE):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=see, is_causal=causal, scale=scale, enable_gqa=grouped and native
        )


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """One key/value head per query head: a view where there is a single group."""
    batch, groups, keys, size = x.shape
    return x[:, :, None].expand(-1, -1, heads // groups, -1, -1).reshape(batch, heads, keys, size)


def _lse(q: Tensor, k: Tensor, causal: bool, key_mask: Tensor | None, scale: float) -> Tensor:
    (batch, heads, queries, size), (groups, keys) = q.shape, k.shape[1:3]
    by_group = (q * scale).reshape(batch, groups, -1, size)
    scores = (by_group @ k.transpose(-2, -1)).view(batch, heads, queries, keys)
    see, empty = _mask(queries, keys, causal, key_mask, q.device)
    lse = scores.masked_fill(~see, float("-inf")).logsumexp(-1)
    return lse.masked_fill(empty.squeeze(-1), float("-inf"))


def _mask(
    queries: int, keys: int, causal: bool, key_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What each query sees, and which rows see nothing: those are let see all, and their output is cleared.

    (What a softmax over nothing gives, and its gradient, depends on the kernel that PyTorch picks.)
    """
    see = torch.ones(1, 1, queries if causal else 1, keys, dtype=torch.bool, device=device)
    if causal:
        see = see.tril(keys - queries)
    if key_mask is not None:
        see = see & key_mask[:, None, None, :]
    empty = ~see.any(-1, keepdim=True)
    return see | empty, empty


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
    """The plain form with the public function's signature."""
    out, lse = forward(q, k, v, causal, key_mask, q.shape[3] ** -0.5 if scale is None else scale, return_lse)
    return (out, lse) if return_lse else out
