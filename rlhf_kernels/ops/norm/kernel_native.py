"""layer_norm and rms_norm by the C++ row kernels: a row is read from memory once, in either direction."""

from __future__ import annotations

from rlhf_kernels.runtime.native import operator

forward = operator("norm")
backward = operator("norm_backward")
