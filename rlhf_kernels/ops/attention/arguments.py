"""Checks that attention and attention_varlen share, and what they declare alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.rotary import RotaryTables, check_table
from rlhf_kernels.runtime.checks import floating, on, positive, shaped

TABLES = "Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin"
_NO_TABLES = (None, None, None, None)

# What decides the backend besides device and dtype: the head size, followed, where there are any, by the
# options that not every backend knows.
ShapeClass = int | tuple[int | str, ...] | None


def shape_class(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, key_mask: Any, scale: float, return_lse: bool,
    window: Any = None, softcap: Any = None, q_cos: Any = None, *_: Any,
) -> ShapeClass:  # fmt: skip
    """That of one call, from the operator's arguments."""
    if window is None and softcap is None and q_cos is None:
        return q.shape[-1]
    options = {"window": window, "softcap": softcap, "rotary": q_cos}
    return (q.shape[-1], *(name for name, value in options.items() if value is not None))


def head_size(shape_class: ShapeClass) -> int | None:
    """The head size of a class, None where it is not said."""
    return shape_class[0] if isinstance(shape_class, tuple) else shape_class


def check_heads(op: str, q: Any, k: Any, v: Any, letters: str, key_letters: str) -> None:
    """TypeError or ValueError unless v is like k, and k like q but for its rows, and heads that divide q's.

    `letters` are the dimensions of q, `key_letters` those of k and v.
    """
    count = letters.count(",") + 1
    for name, x in (("q", q), ("k", k), ("v", v)):
        floating(op, name, x)
        if x.dim() != count:
            split = f"{name}.unflatten(-1, (-1, D)){'.transpose(1, 2)' * (count == 4)}"
            raise ValueError(
                f"{op}(): {name} must be {letters if name == 'q' else key_letters}, got {tuple(x.shape)}. "
                f"Split the heads with {split}."
            )
        if x.dtype != q.dtype:
            raise ValueError(
                f"{op}(): {name} must have q's dtype, {q.dtype}, got {x.dtype}. Cast one of them."
            )
        on(op, "q", q, name, x)
    heads, size, groups = q.shape[1], q.shape[-1], k.shape[1]
    if count == 4:
        shaped(op, "k", k, (q.shape[0], groups, k.shape[2], size), "q's batch and head size")
    else:
        shaped(op, "k", k, (k.shape[0], groups, size), "q's head size")
    shaped(op, "v", v, tuple(k.shape), "the shape of k")
    if size == 0 or groups == 0 or heads % groups:
        raise ValueError(
            f"{op}(): q's heads must be a multiple of k's, of at least one element each, "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}."
        )


def checked_options(
    op: str, q: Tensor, k: Tensor, scale: Any, window: Any, softcap: Any, rotary: Any
) -> tuple[float, tuple[Tensor | None, ...]]:
    """The scale, and cos and sin for q and for k ([..., T, D] and [..., S, D]).

    Raises:
        TypeError, ValueError: a number is none, or not positive; tables do not fit.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    else:
        positive(op, "scale", scale)
    if softcap is not None:
        positive(op, "softcap", softcap)
    if window is not None:
        if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
            raise TypeError(f"{op}(): window must be a whole number, got {type(window).__name__}")
        if window < 1:
            raise ValueError(f"{op}(): window must be at least 1, the query's own place, got {window}")
    return scale, _NO_TABLES if rotary is None else _tables(op, q, k, rotary)


def _tables(op: str, q: Tensor, k: Tensor, rotary: Any) -> tuple[Tensor, ...]:
    if not isinstance(rotary, RotaryTables):
        raise TypeError(
            f"{op}(): rotary must be RotaryTables, got {type(rotary).__name__}. "
            "Pass what rotary_tables(positions, D) returns, or RotaryTables(query, key)."
        )
    for name, x, table in (("q", q, rotary.query), ("k", k, rotary.key)):
        if q.dim() == 3 and any(isinstance(t, Tensor) and t.dim() != 2 for t in table):
            raise ValueError(f"{op}(): the tables of {name} must be [rows, D/2], got {tuple(table[0].shape)}")
        check_table(op, name, x, table)
    tables = (*rotary.query, *rotary.key)
    if any(table.requires_grad for table in tables):
        raise ValueError(f"{op}(): a table requires a gradient, but tables get none. Pass tables without.")
    return tables
