"""The one way a Triton kernel is launched: on the tensors' own device, with empty grids left out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.runtime.dispatch import interpreted

# Under the interpreter bfloat16 arithmetic is wrong (it computes on raw bits): kernels take this constexpr
# and upcast before they compute.
INTERPRETED = interpreted()


def cdiv(a: int, b: int) -> int:
    """Blocks of size b that cover a."""
    return -(-a // b)


def number(value: float, like: Tensor) -> float | Tensor:
    """A float argument of a kernel over `like`: itself, or in memory where that is float64.

    Triton hands Python's floats over as float32. Annotating the argument tl.float64 would cost registers in
    every dtype; `triton_lib.number` is the other half.
    """
    if like.dtype != torch.float64:
        return float(value)
    return torch.full((1,), value, dtype=torch.float64, device=like.device)


def launch(kernel: Any, grid: Sequence[int], on: Tensor, /, *args: Any, **meta: Any) -> None:
    """Runs `kernel[grid](*args, **meta)` with the device of `on` current; Triton takes its current stream.

    Put what can be large on the first axis of the grid: the others end at 65535.
    """
    if 0 in grid:
        return
    if any(n > 65535 for n in grid[1:]) or grid[0] > 2**31 - 1:
        raise ValueError(f"{kernel.fn.__name__}: a grid of {tuple(grid)} is beyond (2^31-1, 65535, 65535)")
    guard = torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext()
    with guard:
        kernel[tuple(grid)](*args, **meta)
