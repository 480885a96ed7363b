"""Device functions that Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_float32(x):
    """Upcasts 16-bit values for arithmetic; float32 and float64 pass."""
    return x if x.dtype == tl.float64 or x.dtype == tl.float32 else x.to(tl.float32)


@triton.jit
def sigmoid(x):
    """Logistic function; tl.sigmoid takes no float64."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def row_start(row, stride, group, apart):
    """Where a row lies, by what launch.row_groups gives; `row` is a program's number, divided in 32 bits."""
    outer = row // group
    return outer.to(tl.int64) * apart + (row - outer * group).to(tl.int64) * stride


@triton.jit
def number(value, ptr):
    """A float argument as launch.number hands it over: in memory beside float64 data, as is at `ptr`."""
    return tl.load(value) if ptr.dtype.element_ty == tl.float64 else value
