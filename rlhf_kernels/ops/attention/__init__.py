"""Attention that never holds the scores: grouped heads, rotary embeddings, masks; decoding steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.attention.arguments import TABLES, check_heads, checked_options, shape_class
from rlhf_kernels.ops.attention.decode import decode_attention
from rlhf_kernels.ops.attention.layout import new_like
from rlhf_kernels.ops.attention.prefix import attention_prefix
from rlhf_kernels.ops.attention.varlen import attention_varlen
from rlhf_kernels.ops.rotary import RotaryTables
from rlhf_kernels.runtime.checks import boolean
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

__all__ = ["attention", "attention_prefix", "attention_varlen", "decode_attention"]

_OP = Op("attention", __name__, {"cpu": ("torch",), "cuda": ("triton", "torch", "gluon")})


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return new_like(q), q.new_empty(q.shape[:3], dtype=dtype)


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return new_like(q), new_like(k), new_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.causal, key_mask, *ctx.options = inputs[:-4]
    ctx.save_for_backward(q, k, v, *output, key_mask, *inputs[-4:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, backward: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, key_mask, *tables = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    args = (grad_out, grad_lse, q, k, v, out, lse, ctx.causal, key_mask, *ctx.options, *tables)
    return *backward(*args), *[None] * 10


def _replay(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    q, k, v, _, _, *options = args
    return (q, k, v, *options), (grad_out, grad_lse)


_OPTIONS = (
    "bool causal, Tensor? key_mask, float scale, bool return_lse, SymInt? window, float? softcap, " + TABLES
)

_attention = Operator(
    _OP,
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _fake,
    backward_schema="(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    backward_fake=_backward_fake,
    setup_context=_setup,
    gradients=_gradients,
    replay=_replay,
    wrt=(0, 1, 2),
    shape_class=shape_class,
).call


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
    rotary: RotaryTables | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(scale * q k^T) v`, exact, in memory linear in T and S (Dao, 2023, arXiv:2307.08691).

    A row that may see no key gives 0, log-sum-exp -inf, and passes no gradient on. What a masked slot of k
    or v holds never matters, NaN included. Results and gradients have the same bits in every run, and a row's
    do not depend on the batch around it: the backward adds nothing up by atomics, for which it makes seven
    products instead of five. (On the `torch` backend this is as PyTorch's own kernels have it.)

    Args:
        q: [B, H, T, D].
        k, v: [B, G, S, D], same dtype and device. H is a multiple of G, and query head h reads key head
            h // (H // G): G = 1 is multi-query, G = H multi-head attention.
        causal: query t sees the keys s <= t + S - T: the last query sees every key.
        key_mask: [B, S] boolean, True where a key may be seen; any pattern.
        scale: positive factor on the scores, D**-0.5 by default.
        window: query t sees only keys less than this far from t + S - T: with `causal` the last `window` keys
            (Beltagy et al., 2020, arXiv:2004.05150).
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118).
        rotary: turns q and k on their way in, as `rotary(q, tables.query)` and `rotary(k, tables.key)` do,
            xPos included: tables of T and of S positions, pairs in halves. On GPUs no turned q or k is in
            memory, but for heads above 128 and in float32.
        return_lse: whether to return the log-sum-exp of each row's scores too.

    Returns:
        [B, H, T, D] in q's dtype, laid out so that `out.transpose(1, 2).reshape(B, T, H * D)` is a view; with
        `return_lse` also [B, H, T] in float32 (float64 for float64). Both carry gradients. Under autocast the
        `torch` backend, which calls PyTorch's attention, may give autocast's dtype in place of q's.

    Raises:
        TypeError: an operand is no floating-point tensor, the mask is not boolean, rotary is no RotaryTables,
            a number is none.
        ValueError: shapes, dtypes or devices do not fit, or scale, window or softcap is not positive.
    """
    check_heads("attention", q, k, v, "[B, H, T, D]", "[B, G, S, D]")
    if key_mask is not None:
        shape = (q.shape[0], k.shape[2])
        boolean("attention", "key_mask", key_mask, shape, q, "one entry for each key, [B, S]")
    scale, tables = checked_options("attention", q, k, scale, window, softcap, rotary)
    out, lse = _attention(q, k, v, causal, key_mask, scale, return_lse, window, softcap, *tables)
    return (out, lse) if return_lse else out
