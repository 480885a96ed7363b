"""Attention on `F.scaled_dot_product_attention`, with the definition's semantics at the edges.

It knows no cap on the scores: with one, all scores are held.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_kernels.ops.attention.layout import heads_inside
from rlhf_kernels.ops.attention.reference import seen
from rlhf_kernels.ops.rotary import RotaryTable, rotary
from rlhf_kernels.ops.rotary.kernel_torch import rotary as plain_rotary
from rlhf_kernels.runtime.library import recomputed

DIFFERENTIABLE = True
TRACEABLE = True  # compiled: through an opaque operator the backward would run the forward again

# Not cuDNN: with a mask its gradients hold NaN (pytorch#196678).
_MASK_SAFE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp where asked for (else 0): that takes all scores, once more."""
    return _attend(rotary, q, k, v, *options)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The same with rotary embeddings in plain PyTorch too: the yardstick."""
    return _attend(plain_rotary, q, k, v, *options)


def _attend(
    turned: Callable[[Tensor, RotaryTable], Tensor],
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
    queries, keys = q.shape[2], k.shape[2]
    causal = causal and (queries > 1 or window is not None)  # a single query sees every key
    if q_cos is not None:
        q, k = turned(q, RotaryTable(q_cos, q_sin)), turned(k, RotaryTable(k_cos, k_sin))
    if key_mask is not None:
        masked = ~key_mask[:, None, :, None]
        k, v = k.masked_fill(masked, 0), v.masked_fill(masked, 0)
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0 or keys == 0:
        nothing = torch.ones((), dtype=torch.bool, device=q.device)
        return heads_inside(q.masked_fill(nothing, 0)), q.new_full(q.shape[:3], float("-inf"), dtype=wide)
    see, empty = None, None
    if key_mask is not None or window is not None or (causal and (queries != keys or softcap is not None)):
        see, empty = _mask(queries, keys, causal, window, key_mask, q.device)
    if softcap is None:
        out = _sdpa(q, k, v, see, causal and see is None, scale)
    else:
        out = _capped(q, k, v, see, scale, softcap)
    if empty is not None:
        out = out.masked_fill(empty, 0)
    if not return_lse:
        return heads_inside(out), q.new_zeros(q.shape[:3], dtype=wide)
    scores = _scores(q.to(wide), k.to(wide), scale, softcap)
    see, empty = _mask(queries, keys, causal, window, key_mask, q.device)
    lse = scores.masked_fill(~see, float("-inf")).logsumexp(-1)
    return heads_inside(out), lse.masked_fill(empty.squeeze(-1), float("-inf"))


def backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, where the operator is opaque to autograd."""
    grad_out, grad_lse, q, k, v, _, _, *options = args
    found = recomputed(lambda *x: forward(*x, *options), (q, k, v), (grad_out, grad_lse))  # not for tables
    return tuple(heads_inside(grad) for grad in found)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, see: Tensor | None, causal: bool, scale: float) -> Tensor:
    # SDPA takes no symbolic truth, which a graph for any number of heads has here.
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
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


def _capped(q: Tensor, k: Tensor, v: Tensor, see: Tensor | None, scale: float, softcap: float) -> Tensor:
    scores = _scores(q, k, scale, softcap)
    weights = (scores if see is None else scores.masked_fill(~see, float("-inf"))).softmax(-1)
    return (_by_group(weights.to(v.dtype), v) @ v).view(q.shape)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, T, n] with the queries of all heads of a group in one matrix, [B, G, H/G T, n]."""
    return x.reshape(*k.shape[:2], -1, x.shape[-1])


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """All scores, [B, H, T, S], in float32 or wider."""
    scores = _by_group(q * scale if softcap is None else q, k) @ k.transpose(-2, -1)
    scores = scores.view(*q.shape[:3], k.shape[2]).to(torch.promote_types(q.dtype, torch.float32))
    return scores if softcap is None else (scores * (scale / softcap)).tanh() * softcap


def _mask(
    queries: int, keys: int, causal: bool, window: int | None, key_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What each query sees, and which rows see nothing: those are let see all, and their output is cleared.

    (What a softmax over nothing gives, and its gradient, depends on the kernel that PyTorch picks.)
    """
    rows = queries if causal or window is not None else 1
    see = seen(rows, keys, causal, window, key_mask, device)
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
    window: int | None = None,
    softcap: float | None = None,
    rotary: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The plain form with the public function's signature."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tables = (None,) * 4 if rotary is None else (*rotary[0], *rotary[1])
    out, lse = plain_forward(q, k, v, causal, key_mask, scale, return_lse, window, softcap, *tables)
    return (out, lse) if return_lse else out
