"""masked_normalize by the C++ kernels: one read for the moments, one read and one write for the result."""

from __future__ import annotations

from rlhf_kernels.runtime.native import operator

forward = operator("masked_normalize")
backward = operator("masked_normalize_backward")
