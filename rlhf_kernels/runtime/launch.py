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


def row_groups(t: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor [..., columns] as rows in groups, as those of `logits[:, :-1]`: it, stride, group and apart.

    Row r lies at r // group * apart + r % group * stride (`triton_lib.row_start`). A copy where its rows do
    not lie so, or columns not side by side.
    """
    found: list[list[int]] = []  # rows and their stride, from the innermost dimension outwards
    for size, stride in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1])):
        if found and stride == found[-1][0] * found[-1][1]:
            found[-1][0] *= size
        elif size != 1:
            found.append([size, stride])
    if len(found) > 2 or (t.shape[-1] > 1 and t.stride(-1) != 1):
        return row_groups(t.contiguous())
    (group, stride), (_, apart) = (*found, [1, 0], [1, 0])[:2]
    return t, stride, max(group, 1), apart


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
