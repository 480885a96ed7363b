"""One decoding step of attention against a cache, split over the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.runtime.checks import FLOATING, floating, on, positive, shaped
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

_OP = Op(
    "decode_attention",
    "rlhf_kernels.ops.attention",
    {"cpu": ("native", "torch"), "cuda": ("triton", "torch")},
    modules={
        "reference": "decode_reference",
        "torch": "decode_kernel_torch",
        "native": "decode_kernel_native",
        "triton": "decode_kernel_triton",
    },
    sized_by=1,
)
_WHOLE = (torch.int64, torch.int32)
_grad_enabled = torch.is_grad_enabled


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


_decode = Operator(
    _OP,
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, Tensor? starts, float scale) -> Tensor",
    _fake,
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output),
    gradients=lambda ctx, run, grad: (None,) * 6,
    shape_class=lambda q, *_: q.shape[-1],
    native="decode_attention",
).call


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`softmax(scale * q k^T) v` of one new token a row against its cache (split as in Dao et al., 2023,
    Flash-Decoding).

    Row b sees the slots starts[b] <= s < lengths[b]: the new token's own key stands at lengths[b] - 1, and a
    prompt padded on the left starts late. A row that sees no slot gives 0. What stands in a slot that is not
    seen never matters, NaN included. The result of a row depends on the row alone, to the bit.

    Args:
        q: [B, H, 1, D].
        k_cache, v_cache: [B, G, C, D], same dtype and device, any strides but contiguous in D, so that a
            slice of a larger cache is not copied. H is a multiple of G, and query head h reads head
            h // (H // G).
        lengths: [B] int64 or int32, one past the last slot that is seen. None means C; what is beyond C, too.
        starts: [B] likewise, the first slot that is seen. None means 0.
        scale: positive factor on the scores, D**-0.5 by default.

    Returns:
        [B, H, 1, D] in q's dtype, contiguous; float32 arithmetic (float64 for float64).

    Raises:
        TypeError: an operand is no floating-point tensor, lengths or starts are not whole numbers, scale is
            no number.
        ValueError: shapes, dtypes or devices do not fit, the scale is not positive, or an input requires a
            gradient: there is none.
    """
    if not _fits(q, k_cache, v_cache, lengths, starts):
        _check(q, k_cache, v_cache, lengths, starts)
    if _grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise ValueError(
            "decode_attention(): an input requires a gradient, but there is none. Decode under "
            "torch.no_grad(), or call attention(q, k, v, key_mask=...), which has one."
        )
    if scale is None:
        scale = q.shape[3] ** -0.5
    else:
        positive("decode_attention", "scale", scale)
    return _decode(q, k_cache, v_cache, lengths, starts, scale)


def _fits(q: Any, k: Any, v: Any, lengths: Any, starts: Any) -> bool:
    """The usual good call, seen in a third of the time that `_check` takes."""
    if not type(q) is type(k) is type(v) is Tensor:
        return False
    shape, cache, device = q.shape, k.shape, q.device
    if not (
        len(shape) == len(cache) == 4
        and cache == v.shape
        and shape[0] == cache[0]
        and shape[2] == 1
        and shape[3] == cache[3] > 0
        and cache[1] > 0
        and shape[1] % cache[1] == 0
        and q.dtype is k.dtype is v.dtype
        and q.dtype in FLOATING
        and device == k.device == v.device
    ):
        return False
    for x in (lengths, starts):
        if x is not None and not (
            type(x) is Tensor and x.dtype in _WHOLE and x.shape == shape[:1] and x.device == device
        ):
            return False
    return True


def _check(q: Any, k: Any, v: Any, lengths: Any, starts: Any) -> None:
    """TypeError or ValueError that says what does not fit."""
    op = "decode_attention"
    for name, x in (("q", q), ("k_cache", k), ("v_cache", v)):
        floating(op, name, x)
        if x.dim() != 4:
            letters = "[B, H, 1, D]" if name == "q" else "[B, G, C, D]"
            raise ValueError(f"{op}(): {name} must be {letters}, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(
                f"{op}(): {name} must have q's dtype, {q.dtype}, got {x.dtype}. Cast one of them."
            )
        on(op, "q", q, name, x)
    (batch, heads, steps, size), (_, groups, slots, _) = q.shape, k.shape
    if steps != 1:
        raise ValueError(
            f"{op}(): q must be one step, [B, H, 1, D], got {tuple(q.shape)}. "
            "Several steps are attention(q, k, v, causal=True, key_mask=...)."
        )
    shaped(op, "k_cache", k, (batch, groups, slots, size), "q's batch and head size")
    shaped(op, "v_cache", v, tuple(k.shape), "the shape of k_cache")
    if size == 0 or groups == 0 or heads % groups:
        raise ValueError(
            f"{op}(): q's heads must be a multiple of the cache's, of at least one element each, "
            f"got q {tuple(q.shape)} and k_cache {tuple(k.shape)}."
        )
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype not in _WHOLE:
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{op}(): {name} must be a tensor of int64 or int32, got {got}. "
                f"Pass torch.tensor({name}, device=q.device)."
            )
        shaped(op, name, x, (batch,), "one number for each row")
        on(op, "q", q, name, x)
