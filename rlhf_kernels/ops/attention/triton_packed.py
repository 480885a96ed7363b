"""Packed sequences: where each begins, and which tile of which sequence a program works on.

A plan is int32 [2, n + 2]: the first row of each of n sequences, of what lies behind the last, and the number
of rows; then how many tiles come before each. What lies behind the last is a sequence without partner.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _first_row(cu_seqlens, i, n, rows):
    """Where sequence i begins; sequence n is what lies behind the last."""
    at = tl.load(cu_seqlens + i, mask=i <= n, other=0).to(tl.int32)
    at = tl.minimum(tl.maximum(at, 0), rows)
    return tl.where(i == 0, 0, tl.where(i <= n, at, rows))


@triton.jit(do_not_specialize=["n", "rows", "tile"])
def plan_kernel(cu_seqlens, plan, n, rows, tile, BLOCK: tl.constexpr):
    """The plan of tiles of `tile` rows, by one program."""
    tiles = 0
    tl.store(plan + n + 2, 0)
    for start in range(0, n + 1, BLOCK):
        i = start + tl.arange(0, BLOCK)
        first = _first_row(cu_seqlens, i, n, rows)
        following = _first_row(cu_seqlens, i + 1, n, rows)
        counts = tl.where(i <= n, (tl.maximum(following - first, 0) + tile - 1) // tile, 0)
        tl.store(plan + i, first, mask=i <= n)
        tl.store(plan + i + 1, following, mask=i == n)
        tl.store(plan + n + 3 + i, tiles + tl.cumsum(counts, 0), mask=i <= n)
        tiles += tl.sum(counts, 0)


@triton.jit
def packed_tile(plan, others, n, rank):
    """The sequence of a tile, the tiles before it, its first row and rows; those two of its partner."""
    starts = plan + n + 2
    low, high = rank * 0, rank * 0 + n + 1
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(starts + middle) <= rank
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    first, other = tl.load(plan + low), tl.load(others + low)
    rows = tl.load(plan + low + 1) - first
    partners = tl.where(low < n, tl.maximum(tl.load(others + low + 1) - other, 0), 0)
    return low, tl.load(starts + low), first.to(tl.int64), rows, other.to(tl.int64), partners
