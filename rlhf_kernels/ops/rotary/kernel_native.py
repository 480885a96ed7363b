"""rotary by the C++ row kernels: x in its own layout, positions in parallel."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels.runtime.native import operator

_forward = operator("rotary")


def forward(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool, grain: int | None = None
) -> Tensor:
    """Every pair turned. What is at its default is left out: the dispatcher spends 0.2 us on reading each."""
    if grain is not None:
        return _forward(x, cos, sin, interleaved, conjugate, grain)
    if interleaved or conjugate:
        return _forward(x, cos, sin, interleaved, conjugate)
    return _forward(x, cos, sin)
