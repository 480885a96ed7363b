"""swiglu by the C++ row kernels: one pass over each operand, rows in parallel."""

from __future__ import annotations

from torch import Tensor

from rlhf_kernels.runtime.native import operator

_forward = operator("swiglu")
backward = operator("swiglu_backward")


def forward(x: Tensor, gate: Tensor | None, gate_first: bool, grain: int | None = None) -> Tensor:
    """silu(gate) * x. What is at its default is left out: the dispatcher spends 0.2 us on reading each."""
    if grain is not None:
        return _forward(x, gate, gate_first, grain)
    if gate is not None:
        return _forward(x, gate)
    return _forward(x, None, True) if gate_first else _forward(x)
