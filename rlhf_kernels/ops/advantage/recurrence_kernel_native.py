"""linear_recurrence by the C++ row kernel: rows in vector lanes, one walk through time."""

from __future__ import annotations

from rlhf_kernels.runtime.native import operator

forward = operator("linear_recurrence")
