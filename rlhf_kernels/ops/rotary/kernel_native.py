"""rotary by the C++ row kernels: x in its own layout, positions in parallel."""

from __future__ import annotations

from rlhf_kernels.runtime.native import operator

forward = operator("rotary")
