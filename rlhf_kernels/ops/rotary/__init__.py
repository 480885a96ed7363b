"""Rotary position embeddings: pairs of a head's elements turned by their position's angles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.rotary.tables import RotaryTable, RotaryTables, rotary_tables
from rlhf_kernels.runtime.checks import FLOATING, floating, on
from rlhf_kernels.runtime.dispatch import Op
from rlhf_kernels.runtime.library import Operator

__all__ = ["RotaryTable", "RotaryTables", "rotary", "rotary_tables"]

_FLOAT32 = torch.float32  # a look-up less in each call
_OP = Op("rotary", __name__, {"cpu": ("native", "torch"), "cuda": ("triton", "torch")})


def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.conjugate = inputs
    if any(ctx.needs_input_grad[1:3]):
        raise ValueError("rotary(): a table requires a gradient, but tables get none. Pass tables without.")
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
    native="rotary",
).call


def rotary(x: Tensor, tables: RotaryTable, *, interleaved: bool = False) -> Tensor:
    """Turns the pairs (a, b) of x's last dimension: (a cos - b sin, b cos + a sin).

    `rotary(q, tables.query)` and `rotary(k, tables.key)` with `tables = rotary_tables(positions, D)`.

    Args:
        x: [..., T, D], any strides but contiguous in D: a [B, T, H, D].transpose(1, 2) is not copied.
        tables: cos and sin, each float32 [T, D/2] for any leading dimensions, or [B, T, D/2] where B is the
            first dimension of x. They get no gradient: where one is required, the kernels refuse.
        interleaved: whether the pairs are neighbours (GPT-J); else each half of a head holds one of every
            pair (GPT-NeoX, Llama, PaLM-rlhf-pytorch).

    Returns:
        [..., T, D] in x's dtype, contiguous; arithmetic is in float32 (float64 for float64).

    Raises:
        TypeError: x is no floating-point tensor, or tables are no pair of float32 tensors.
        ValueError: shapes or devices do not fit.
    """
    if not _fits(x, tables):
        _refuse("rotary", "x", x, tables)
    cos, sin = tables
    return _rotary(x, cos, sin, interleaved, False)


def turned_back(grad: Tensor, tables: RotaryTable) -> Tensor:
    """The gradient of x from that of `rotary(x, tables)`, for kernels that turn x themselves."""
    return _rotary(grad, *tables, False, True)


def _fits(x: Any, tables: Any) -> bool:
    """The usual good call, seen in a third of the time that the checks take."""
    if type(tables) is not RotaryTable:
        return False
    cos, sin = tables
    if not type(x) is type(cos) is type(sin) is Tensor:
        return False
    shape, table = x.shape, cos.shape
    rank = len(table)
    return (
        (rank == 2 <= len(shape) or (rank == 3 <= len(shape) and table[0] == shape[0]))
        and table[-2] == shape[-2]
        and 2 * table[-1] == shape[-1]
        and table == sin.shape
        and cos.dtype is _FLOAT32 is sin.dtype
        and x.dtype in FLOATING
        and ((x.is_cpu and cos.is_cpu and sin.is_cpu) or x.device == cos.device == sin.device)
    )


def check_table(op: str, name: str, x: Any, tables: Any) -> None:
    """TypeError or ValueError where `tables` cannot turn x, which `op` knows as `name`."""
    if not _fits(x, tables):
        _refuse(op, name, x, tables)


def _refuse(op: str, name: str, x: Any, tables: Any) -> None:
    """TypeError or ValueError that says what does not fit, or nothing: subclasses of Tensor come here."""
    floating(op, name, x)
    shape = x.shape
    if len(shape) < 2 or shape[-1] % 2:
        raise ValueError(f"{op}(): {name} must be [..., T, D] with an even D, got {tuple(shape)}")
    if isinstance(tables, RotaryTables) or not isinstance(tables, tuple) or len(tables) != 2:
        raise TypeError(
            f"{op}(): the tables of {name} must be a RotaryTable (cos, sin), got {type(tables).__name__}. "
            "Pass the .query or the .key of rotary_tables(...)."
        )
    expected = (shape[-2], shape[-1] // 2)
    allowed = (expected, (shape[0], *expected)) if len(shape) > 2 else (expected,)
    for part, table in zip(RotaryTable._fields, tables):
        if not isinstance(table, Tensor) or table.dtype is not torch.float32:
            got = str(table.dtype) if isinstance(table, Tensor) else type(table).__name__
            raise TypeError(
                f"{op}(): {part} must be a float32 tensor, got {got}. Make it with rotary_tables(...)."
            )
        if table.shape not in allowed:
            raise ValueError(
                f"{op}(): {part} must be [T, D/2] or, with {name}'s first dimension, [B, T, D/2]: "
                f"{' or '.join(map(str, allowed))} for {name} {tuple(shape)}, got {tuple(table.shape)}. "
                f"Make the tables of {name}'s positions."
            )
        on(op, name, x, part, table)
    if tables[0].shape != tables[1].shape:
        got = " and ".join(str(tuple(table.shape)) for table in tables)
        raise ValueError(f"{op}(): cos and sin must have one shape, got {got}")
