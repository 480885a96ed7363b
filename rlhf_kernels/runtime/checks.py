"""Argument checks that say what was got, what is expected and how to fix it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
FLOATING = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def floating(op: str, name: str, x: Any) -> None:
    """TypeError unless x is a tensor of a floating-point dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{op}(): {name} must be a tensor, got {type(x).__name__}. Wrap it with torch.as_tensor."
        )
    if x.dtype not in FLOATING:
        raise TypeError(
            f"{op}(): {name} must be float32, bfloat16, float16 or float64, got {_dtype(x)} "
            f"{tuple(x.shape)}. Cast with {name}.float()."
        )


def matrix(op: str, name: str, x: Any) -> None:
    """TypeError or ValueError unless x is a floating-point tensor [batch, time]."""
    floating(op, name, x)
    if x.dim() != 2:
        raise ValueError(
            f"{op}(): {name} must be [batch, time], got {tuple(x.shape)}. One row is {name}[None]."
        )


def same(op: str, name: str, x: Tensor, other_name: str, other: Any) -> None:
    """TypeError or ValueError unless `other` is a tensor of x's shape, dtype and device."""
    if not isinstance(other, Tensor):
        raise TypeError(f"{op}(): {other_name} must be a tensor, got {type(other).__name__}")
    if other.dtype is x.dtype and other.shape == x.shape and other.device == x.device:
        return
    if other.dtype != x.dtype:
        raise TypeError(
            f"{op}(): {other_name} must have the dtype of {name}, {_dtype(x)}, got {_dtype(other)}. "
            f"Cast with {other_name}.to({name}.dtype)."
        )
    shaped(op, other_name, other, tuple(x.shape), f"the shape of {name}")
    on(op, name, x, other_name, other)


def shaped(op: str, name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """ValueError unless x has this shape."""
    if x.shape != shape:
        raise ValueError(f"{op}(): {name} must have {meaning}, {tuple(shape)}, got {tuple(x.shape)}")


def on(op: str, name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if other.device != x.device:
        raise ValueError(
            f"{op}(): {name} is on {x.device} and {other_name} on {other.device}. "
            f"Move it with {other_name}.to({name}.device)."
        )


def boolean(op: str, name: str, mask: Any, shape: tuple[int, ...], like: Tensor, meaning: str) -> None:
    """TypeError or ValueError unless `mask` is a boolean tensor of this shape, on the device of `like`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}(): {name} must be a boolean tensor, got {type(mask).__name__}")
    if mask.dtype is torch.bool and mask.shape == shape and mask.device == like.device:
        return
    if mask.dtype != torch.bool:
        is_mask = name.endswith("mask")  # else a flag, which nobody adds
        real, additive = (" (True where real)", f"; an additive mask of 0 and -inf is {name} == 0")
        raise TypeError(
            f"{op}(): {name} must be boolean{real * is_mask}, got {_dtype(mask)} {tuple(mask.shape)}. "
            f"Convert with {name}.bool(){additive * is_mask}."
        )
    shaped(op, name, mask, shape, meaning)
    on(op, "the input", like, name, mask)


def readable(x: Tensor) -> bool:
    """Whether the numbers can be looked at: not on a GPU, which would be waited for, nor while a graph is
    made or torch.func transforms, when there may be none."""
    return (
        type(x) is Tensor
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._len_torch_dispatch_stack()
    )


def tokens(
    op: str, name: str, ids: Any, shape: tuple[int, ...], like: Tensor, size: int, ignored: int | None = None
) -> None:
    """TypeError or ValueError unless `ids` are int64 numbers of this shape, below `size` but for `ignored`.

    The range is looked at where that is possible: see `readable`.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}(): {name} must be an int64 tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise TypeError(
            f"{op}(): {name} must be int64, got {_dtype(ids)} {tuple(ids.shape)}. Cast with {name}.long()."
        )
    shaped(op, name, ids, shape, "one token for each row")
    on(op, "the input", like, name, ids)
    if not readable(ids):
        return
    outside = (ids < 0) | (ids >= size)
    if ignored is not None:
        outside &= ids != ignored
    if outside.any():
        but = "" if ignored is None else f" or {ignored}, which is ignored"
        raise ValueError(
            f"{op}(): {name} must be at least 0 and below {size}{but}, got {ids[outside][0].item()}. "
            "Give masked positions any valid token, and mask the result."
        )


def number(op: str, name: str, value: Any) -> None:
    """TypeError unless value is a Python number."""
    if not isinstance(value, _NUMBERS):
        raise TypeError(
            f"{op}(): {name} must be a Python number, got {type(value).__name__}. "
            "A tensor gives one by .item()."
        )


def positive(op: str, name: str, value: Any) -> None:
    """TypeError or ValueError unless value is a finite number above zero."""
    number(op, name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{op}(): {name} must be positive and finite, got {value!r}")


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
