"""vtrace by the C++ row kernel: rows in vector lanes, one walk through time."""

from __future__ import annotations

from rlhf_kernels.ops.advantage.vtrace_kernel_torch import backward
from rlhf_kernels.runtime.native import operator

__all__ = ["backward", "forward"]

forward = operator("vtrace")
