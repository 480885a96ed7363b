"""swiglu by the C++ row kernels: one pass over each operand, rows in parallel."""

from __future__ import annotations

from rlhf_kernels.runtime.native import operator

forward = operator("swiglu")
backward = operator("swiglu_backward")
