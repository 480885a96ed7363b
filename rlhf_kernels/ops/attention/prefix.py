"""Attention of several responses to one prompt, whose keys they read together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.attention.arguments import TABLES, check_heads, checked_options
from rlhf_kernels.ops.attention.layout import new_like
from rlhf_kernels.ops.rotary import RotaryTables
from rlhf_kernels.runtime.checks import boolean, floating, on, shaped
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

_NAME = "attention_prefix"
_OP = Op(
    _NAME,
    "rlhf_kernels.ops.attention",
    {"cpu": ("torch",), "cuda": ("triton", "torch")},
    modules={
        "reference": "prefix_reference",
        "torch": "prefix_kernel_torch",
        "triton": "prefix_kernel_triton",
    },
)


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return new_like(q), q.new_empty(q.shape[:3], dtype=dtype)


def _backward_fake(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    return tuple(map(new_like, args[:5]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *rows, ctx.causal, key_mask, prefix_mask, ctx.scale, ctx.return_lse = inputs[:-4]
    ctx.save_for_backward(*rows, *output, key_mask, prefix_mask, *inputs[-4:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, backward: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *saved, key_mask, prefix_mask, q_cos, q_sin, k_cos, k_sin = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[5])
    options = (ctx.causal, key_mask, prefix_mask, ctx.scale, ctx.return_lse, q_cos, q_sin, k_cos, k_sin)
    return *backward(grad_out, grad_lse, *saved, *options), *[None] * 9


def _replay(grad_out: Tensor, grad_lse: Tensor | None, *args: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (*args[:5], *args[7:]), (grad_out, grad_lse)


_ROWS = "Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v"
_OPTIONS = "bool causal, Tensor? key_mask, Tensor? prefix_mask, float scale, bool return_lse, " + TABLES
_prefix = Operator(
    _OP,
    f"({_ROWS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _fake,
    backward_schema=f"(Tensor grad_out, Tensor? grad_lse, {_ROWS}, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_fake=_backward_fake,
    setup_context=_setup,
    gradients=_gradients,
    replay=_replay,
    wrt=(0, 1, 2, 3, 4),
    shape_class=lambda q, *_: q.shape[-1],
).call


def attention_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = True,
    key_mask: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    scale: float | None = None,
    rotary: RotaryTables | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of n rows that begin with one prefix, as n responses to a prompt do, and hold it once.

    Row b reads the keys of prefix b // n before its own. Against the prefix the queries of the n rows are
    those of one row, so that its keys are read once for all of them and their gradients added up inside the
    kernel; both parts are joined by their log-sum-exps (as in Juravsky et al., 2024, arXiv:2402.05099). Bits
    repeat; they may depend on how many rows share a prefix.

    Args:
        q: [B, H, T, D].
        k, v: [B, G, S, D], the rows' own keys and values, S >= T; dtype and device as in `attention`.
        prefix_k, prefix_v: [P, G, U, D]; B is n times P.
        causal: query t sees the own keys s <= t + S - T; every query sees the whole prefix.
        key_mask: [B, S] boolean, True where an own key may be seen.
        prefix_mask: [P, U] boolean, likewise.
        scale: positive factor on the scores, D**-0.5 by default.
        rotary: turns q and both parts' keys on their way in, as in `attention`: tables of the U + S positions
            of a prefix and what follows it, [U + S, D/2] or one for each prefix, [P, U + S, D/2]. Those of
            the queries are the last T.
        return_lse: whether to return the log-sum-exp of each row's scores too.

    Returns:
        What `attention` returns.

    Raises:
        TypeError, ValueError: as in `attention`; or B is no multiple of P, or S < T.
    """
    check_heads(_NAME, q, k, v, "[B, H, T, D]", "[B, G, S, D]")
    batch, prefixes = q.shape[0], _check_prefix(k, prefix_k, prefix_v)
    if k.shape[2] < q.shape[2]:
        raise ValueError(
            f"{_NAME}(): every query needs its own key, got q {tuple(q.shape)} and k {tuple(k.shape)}. "
            "Queries of the prefix are attention(...)."
        )
    if key_mask is not None:
        boolean(_NAME, "key_mask", key_mask, (batch, k.shape[2]), q, "one entry for each key, [B, S]")
    if prefix_mask is not None:
        expected = (prefixes, prefix_k.shape[2])
        boolean(_NAME, "prefix_mask", prefix_mask, expected, q, "one entry for each key, [P, U]")
    # All keys of a prefix and what follows it, without memory: what tables have to fit.
    whole = k.new_empty(()).expand(prefixes, k.shape[1], prefix_k.shape[2] + k.shape[2], k.shape[3])
    scale, tables = checked_options(_NAME, whole, whole, scale, None, None, rotary)
    if rotary is not None:
        steps = q.shape[2]
        tables = (*(t.narrow(-2, t.shape[-2] - steps, steps) for t in tables[:2]), *tables[2:])
    options = (causal, key_mask, prefix_mask, scale, return_lse, *tables)
    out, lse = _prefix(q, k, v, prefix_k, prefix_v, *options)
    return (out, lse) if return_lse else out


def _check_prefix(k: Tensor, prefix_k: Any, prefix_v: Any) -> int:
    """How many prefixes there are; TypeError or ValueError where they do not fit the own keys."""
    for name, x in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        floating(_NAME, name, x)
        on(_NAME, "k", k, name, x)
        if x.dtype != k.dtype:
            raise ValueError(
                f"{_NAME}(): {name} must have k's dtype, {k.dtype}, got {x.dtype}. Cast one of them."
            )
    got, batch = tuple(prefix_k.shape), k.shape[0]
    if len(got) != 4 or (got[1], got[3]) != (k.shape[1], k.shape[3]) or got[0] == 0 or batch % got[0]:
        raise ValueError(
            f"{_NAME}(): prefix_k must be [P, G, U, D] with k's heads and sizes, and B a multiple of P, "
            f"got {got} for k {tuple(k.shape)}."
        )
    shaped(_NAME, "prefix_v", prefix_v, got, "the shape of prefix_k")
    return got[0]
