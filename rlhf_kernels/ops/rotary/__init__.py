"""Rotary position embeddings: pairs of a head's elements turned by their position's angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.rotary.tables import RotaryTable, RotaryTables, rotary_tables
from rlhf_kernels.runtime.checks import floating, on
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

__all__ = ["RotaryTable", "RotaryTables", "rotary", "rotary_tables"]

_OP = Op("rotary", __name__, {"cpu": ("native", "torch"), "cuda": ("triton", "torch")})


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.conjugate = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx: Any, run: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return run(grad, cos, sin, ctx.interleaved, not ctx.conjugate), None, None, None, None


# A rotation's gradient is the rotation back: the op is its own backward, and differentiable to any order.
_rotary = Operator(
    _OP,
    "(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool conjugate) -> Tensor",
    _fake,
    setup_context=_setup,
    gradients=_gradients,
)


def rotary(x: Tensor, tables: RotaryTable, *, interleaved: bool = False) -> Tensor:
    """Turns the pairs (a, b) of x's last dimension: (a cos - b sin, b cos + a sin).

    `rotary(q, tables.query)` and `rotary(k, tables.key)` with `tables = rotary_tables(positions, D)`.

    Args:
        x: [..., T, D], any strides but contiguous in D: a [B, T, H, D].transpose(1, 2) is not copied.
        tables: cos and sin, each float32 [T, D/2] for any leading dimensions, or [B, T, D/2] where B is the
            first dimension of x. They get no gradient.
        interleaved: whether the pairs are neighbours (GPT-J); else each half of a head holds one of every
            pair (GPT-NeoX, Llama, PaLM-rlhf-pytorch).

    Returns:
        [..., T, D] in x's dtype, contiguous; arithmetic is in float32 (float64 for float64).

    Raises:
        TypeError: x is no floating-point tensor, or tables are no pair of float32 tensors.
        ValueError: shapes or devices do not fit, or a table requires a gradient.
    """
    floating("rotary", "x", x)
    shape = x.shape
    if len(shape) < 2 or shape[-1] % 2:
        raise ValueError(f"rotary(): x must be [..., T, D] with an even D, got {tuple(shape)}")
    if isinstance(tables, RotaryTables) or not isinstance(tables, tuple) or len(tables) != 2:
        raise TypeError(
            f"rotary(): tables must be a RotaryTable (cos, sin), got {type(tables).__name__}. "
            "Pass the .query or the .key of rotary_tables(...)."
        )
    expected = (shape[-2], shape[-1] // 2)
    for name, table in zip(RotaryTable._fields, tables):
        _check_table(name, table, x, expected)
    cos, sin = tables
    if cos.dim() != sin.dim():
        raise ValueError(
            f"rotary(): cos and sin must have one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return _rotary(x, cos, sin, interleaved, False)


def _check_table(name: str, table: Any, x: Tensor, expected: tuple[int, int]) -> None:
    """A float32 tensor without gradient, `expected` or with x's first dimension before it, on x's device."""
    if not isinstance(table, Tensor) or table.dtype is not torch.float32:
        got = str(table.dtype) if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(
            f"rotary(): {name} must be a float32 tensor, got {got}. Make it with rotary_tables(...)."
        )
    if table.shape != expected and not (x.dim() > 2 and table.shape == (x.shape[0], *expected)):
        per_row = f" or {(x.shape[0], *expected)}" if x.dim() > 2 else ""
        raise ValueError(
            f"rotary(): {name} must be [T, D/2] or [B, T, D/2], here {expected}{per_row}, for x "
            f"{tuple(x.shape)}, got {tuple(table.shape)}. Cut the table to x's positions."
        )
    if table.requires_grad:
        raise ValueError(
            f"rotary(): {name} requires a gradient, which tables do not get. Pass {name}.detach()."
        )
    on("rotary", "x", x, name, table)
