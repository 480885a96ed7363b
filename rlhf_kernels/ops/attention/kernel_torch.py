"""Attention on `F.scaled_dot_product_attention`, with the definition's semantics at the edges.

It knows no cap on the scores: with one, all scores are held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf_kernels.ops.attention.layout import heads_inside, rows_whole
from rlhf_kernels.ops.attention.reference import seen
from rlhf_kernels.ops.rotary import RotaryTable, rotary, turned_back
from rlhf_kernels.ops.rotary.kernel_torch import rotary as plain_rotary
from rlhf_kernels.runtime.library import recomputed, transformed

DIFFERENTIABLE = True
TRACEABLE = True  # in a graph, entering an opaque operator costs more than a small call

# Not cuDNN: with a mask its gradients hold NaN (pytorch#196678).
_MASK_SAFE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp where asked for (else 0).

    PyTorch's kernel for CPUs knows it; elsewhere, and under torch.func, that takes all scores, once more.
    """
    return _attend(rotary, False, q, k, v, *options)


def opaque(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The same, with the log-sum-exp wherever PyTorch's kernel knows it: `backward` reads it."""
    return _attend(rotary, True, q, k, v, *options)


def plain_forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """`forward` with rotary embeddings in plain PyTorch too: the yardstick."""
    return _attend(plain_rotary, False, q, k, v, *options)


def _attend(
    turned: Callable[[Tensor, RotaryTable], Tensor],
    is_opaque: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    return_lse: bool,
    window: int | None = None,
    softcap: float | None = None,
    *tables: Tensor | None,
) -> tuple[Tensor, Tensor]:
    told = is_opaque or (return_lse and not transformed())
    q, k, v = _prepared(turned, q, k, v, key_mask, *tables)
    wide = torch.promote_types(q.dtype, torch.float32)
    if q.numel() == 0 or k.shape[2] == 0:
        nothing = torch.ones((), dtype=torch.bool, device=q.device)
        return heads_inside(q.masked_fill(nothing, 0)), q.new_full(q.shape[:3], float("-inf"), dtype=wide)
    is_causal, see, empty = _needed_mask(q, k, causal, window, key_mask, softcap)
    lse = None
    if told and _tells_lse(q, k, softcap):
        q, k, v = map(rows_whole, (q, k, v))
        mask = _as_scores(see, q)
        out, lse = _flash(q, k, v, is_causal=is_causal, attn_mask=mask, scale=scale)
        if not is_opaque:
            lse = _LogSumExp.apply(q, k, lse, mask, is_causal, scale)
        if empty is not None:
            lse = lse.masked_fill(empty.squeeze(-1), float("-inf"))
        if return_lse:
            lse = lse.contiguous()
    elif softcap is None:
        out = _sdpa(q, k, v, see, is_causal, scale)
    else:
        out = _capped(q, k, v, see, scale, softcap)
    if empty is not None:
        out = out.masked_fill(empty, 0)
    if lse is None and return_lse:
        see, empty = _mask(q, k, causal, window, key_mask)
        scores = _scores(q.to(wide), k.to(wide), scale, softcap).masked_fill(~see, float("-inf"))
        lse = scores.logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))
    return heads_inside(out), q.new_zeros(q.shape[:3], dtype=wide) if lse is None else lse


def backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, where the operator is opaque to autograd."""
    return tuple(map(heads_inside, gradients(*args)))


def gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    scale: float,
    return_lse: bool,
    window: int | None,
    softcap: float | None,
    *tables: Tensor | None,
) -> Sequence[Tensor]:
    """Those of q, k and v, in any layout; `out` and `lse` are those of `opaque`."""
    if not _tells_lse(q, k, softcap):
        options = (causal, key_mask, scale, return_lse, window, softcap, *tables)
        return recomputed(lambda *x: forward(*x, *options), (q, k, v), (grad_out, grad_lse))  # not for tables
    q, k, v = _prepared(rotary, q, k, v, key_mask, *tables)
    is_causal, see, empty = _needed_mask(q, k, causal, window, key_mask, softcap)
    if empty is not None:  # weights are e^(score - lse): there 0
        grad_out, lse = grad_out.masked_fill(empty, 0), lse.masked_fill(empty.squeeze(-1), float("inf"))
    grad_out, q, k, v, out = map(rows_whole, (grad_out, q, k, v, out))
    mask = _as_scores(see, q)
    dq, dk, dv = _flash_backward(grad_out, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
    if grad_lse is not None:
        grad_lse = grad_lse if empty is None else grad_lse.masked_fill(empty.squeeze(-1), 0)
        more = _lse_gradients(grad_lse, q, k, lse, mask, is_causal, scale)
        dq, dk = dq + more[0], dk + more[1]
    dk, dv = _cleared(key_mask, dk, dv)
    if tables[0] is not None:
        dq, dk = turned_back(dq, RotaryTable(*tables[:2])), turned_back(dk, RotaryTable(*tables[2:]))
    return dq, dk, dv


class _LogSumExp(torch.autograd.Function):
    """What PyTorch's kernel tells without a derivative, with it."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, lse, mask)
        ctx.options = is_causal, scale
        return lse.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_lse_gradients(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


def _lse_gradients(
    grad: Tensor, q: Tensor, k: Tensor, lse: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Those of q and k, in memory linear in their lengths.

    The gradient of a score is weight * grad. PyTorch's kernel has weight * (grad_out v^T - sum grad_out out):
    the same where v is 0, and grad_out 1 and out -grad in one column, or two: 16 bits round grad.
    """
    ones, out, v = torch.zeros_like(q), torch.zeros_like(q), torch.zeros_like(k)
    ones[..., :2] = 1
    out[..., 0] = -grad
    if q.shape[-1] > 1:
        out[..., 1] = -grad - out[..., 0]
    dq, dk, _ = _flash_backward(ones, q, k, v, out, lse, 0.0, is_causal, attn_mask=mask, scale=scale)
    return dq, dk


def _prepared(
    turned: Callable[[Tensor, RotaryTable], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    q_cos: Tensor | None = None,
    q_sin: Tensor | None = None,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k turned, k and v without what may not be seen."""
    if q_cos is not None:
        q, k = turned(q, RotaryTable(q_cos, q_sin)), turned(k, RotaryTable(k_cos, k_sin))
    return q, *_cleared(key_mask, k, v)


def _cleared(key_mask: Tensor | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if key_mask is None:
        return k, v
    masked = ~key_mask[:, None, :, None]
    return k.masked_fill(masked, 0), v.masked_fill(masked, 0)


def _tells_lse(q: Tensor, k: Tensor, softcap: float | None) -> bool:
    """Whether PyTorch's kernel for CPUs gives the log-sum-exp, and takes it for the gradients."""
    return q.is_cpu and softcap is None and q.numel() > 0 and k.shape[2] > 0


def _as_scores(see: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as what is added to the scores."""
    return None if see is None else q.new_zeros(see.shape).masked_fill(~see, float("-inf"))


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


def _needed_mask(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    key_mask: Tensor | None,
    softcap: float | None,
) -> tuple[bool, Tensor | None, Tensor | None]:
    """PyTorch's `is_causal`, or what it takes no word for: `_mask`."""
    queries, keys = q.shape[2], k.shape[2]
    if causal and queries == 1 and window is None:
        causal = False  # a single query sees every key
    if key_mask is not None or window is not None or (causal and (queries != keys or softcap is not None)):
        return False, *_mask(q, k, causal, window, key_mask)
    return causal, None, None


def _mask(
    q: Tensor, k: Tensor, causal: bool, window: int | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What each query sees, and which rows see nothing: those are let see all, and their output is cleared.

    (What a softmax over nothing gives, and its gradient, depends on the kernel that PyTorch picks.)
    """
    rows = q.shape[2] if causal or window is not None else 1
    see = seen(rows, k.shape[2], causal, window, key_mask, q.device)
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
