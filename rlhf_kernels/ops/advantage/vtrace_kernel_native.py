"""vtrace by the C++ row kernel: rows in vector lanes, one walk through time."""

from __future__ import annotations

from rlhf_kernels.ops.advantage.vtrace_kernel_torch import backward, differentiable
from rlhf_kernels.runtime.native import operator

__all__ = ["backward", "differentiable", "forward"]

forward = operator("vtrace")
