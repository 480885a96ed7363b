"""sample by the C++ row kernel: a row is weighed and cut while it is in the cache; nothing is sorted."""

from __future__ import annotations

from rlhf_kernels.runtime.native import operator

forward = operator("sample")
