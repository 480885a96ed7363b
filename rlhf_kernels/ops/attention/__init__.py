"""Attention with grouped heads, a causal mask and any key mask, never holding the scores; decoding steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.attention.decode import decode_attention
from rlhf_kernels.ops.attention.layout import new_like
from rlhf_kernels.runtime.checks import boolean, floating, on, shaped
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

__all__ = ["attention", "decode_attention"]

_OP = Op("attention", __name__, {"cpu": ("torch",), "cuda": ("triton", "torch")})


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return new_like(q), q.new_empty(q.shape[:3], dtype=dtype)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(q), new_like(k), new_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, key_mask, ctx.scale, ctx.return_lse = inputs
    ctx.save_for_backward(q, k, v, *output, key_mask)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, backward: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, key_mask = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    args = (grad_out, grad_lse, q, k, v, out, lse, ctx.causal, key_mask, ctx.scale, ctx.return_lse)
    return (*backward(*args), None, None, None, None)


def _replay(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    q, k, v, _, _, *options = args
    return (q, k, v, *options), (grad_out, grad_lse)


_attention = Operator(
    _OP,
    "(Tensor q, Tensor k, Tensor v, bool causal, Tensor? key_mask, float scale, bool return_lse)"
    " -> (Tensor, Tensor)",
    _fake,
    backward_schema="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, bool causal, Tensor? key_mask, float scale, bool return_lse) -> (Tensor, Tensor, Tensor)",
    backward_fake=_backward_fake,
    setup_context=_setup,
    gradients=_gradients,
    replay=_replay,
    wrt=(0, 1, 2),
    shape_class=lambda q, *_: q.shape[-1],
).call


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
    """`softmax(scale * q k^T) v`, exact, in memory linear in T and S (Dao, 2023, arXiv:2307.08691).

    A row that may see no key gives 0, log-sum-exp -inf, and passes no gradient on. What a masked slot of k
    or v holds never matters, NaN included.

    Args:
        q: [B, H, T, D].
        k, v: [B, G, S, D], same dtype and device. H is a multiple of G, and query head h reads key head
            h // (H // G): G = 1 is multi-query, G = H multi-head attention.
        causal: query t sees the keys s <= t + S - T: the last query sees every key.
        key_mask: [B, S] boolean, True where a key may be seen; any pattern.
        scale: positive factor on the scores, D**-0.5 by default.
        return_lse: whether to return the log-sum-exp of each row's scores too.

    Returns:
        [B, H, T, D] in q's dtype, laid out so that `out.transpose(1, 2).reshape(B, T, H * D)` is a view; with
        `return_lse` also [B, H, T] in float32 (float64 for float64). Both carry gradients.

    Raises:
        TypeError: an operand is no floating-point tensor, or the mask is not boolean.
        ValueError: shapes, dtypes or devices do not fit, or the scale is not positive.
    """
    _check(q, k, v, key_mask)
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"attention(): scale must be positive and finite, got {scale}. Negate q instead.")
    out, lse = _attention(q, k, v, causal, key_mask, scale, return_lse)
    return (out, lse) if return_lse else out


def _check(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        floating("attention", name, x)
        if x.dim() != 4:
            letters = "[B, H, T, D]" if name == "q" else "[B, G, S, D]"
            raise ValueError(
                f"attention(): {name} must be {letters}, got {tuple(x.shape)}. Split the heads with "
                f"{name}.unflatten(-1, (-1, D)).transpose(1, 2)."
            )
        if x.dtype != q.dtype:
            raise ValueError(
                f"attention(): {name} must have q's dtype, {q.dtype}, got {x.dtype}. Cast one of them."
            )
        on("attention", "q", q, name, x)
    (batch, heads, _, size), (_, groups, keys, _) = q.shape, k.shape
    shaped("attention", "k", k, (batch, groups, keys, size), "q's batch and head size")
    shaped("attention", "v", v, tuple(k.shape), "the shape of k")
    if size == 0 or groups == 0 or heads % groups:
        raise ValueError(
            f"attention(): q's heads must be a multiple of k's, of at least one element each, "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}."
        )
    if key_mask is not None:
        boolean("attention", "key_mask", key_mask, (batch, keys), q, "one entry for each key, [B, S]")
