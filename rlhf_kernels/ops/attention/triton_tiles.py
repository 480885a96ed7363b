"""What the attention kernels share: the order of programs, which tiles need a mask, loads and products.

A loop over tiles comes in two halves. Tiles [dense, dense_end) need no mask at all; those of [begin, dense)
and [dense_end, end), which are the causal diagonal, ragged ends and the edges of a key mask, do: a second
loop takes both.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_and_head(n_tiles, n_heads, heads_per_wave):
    """This program's tile and head.

    A wave is a few heads whose keys stay in the L2 cache. Inside it the tile changes slowest, so that a
    kernel can begin with the tiles that take longest.
    """
    program = tl.program_id(0)
    first = program // (n_tiles * heads_per_wave) * heads_per_wave
    heads = tl.minimum(heads_per_wave, n_heads - first)
    rank = program - first * n_tiles
    return rank // heads, first + rank % heads


@triton.jit
def visible_key_tiles(
    span, batch, first_query, S, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The key tiles that queries [first_query, first_query + BLOCK_M) see: begin, dense, dense_end, end."""
    low, dense_low, high, dense_high = 0, 0, S, S
    if HAS_MASK:
        low = tl.load(span + 3 * batch)
        dense_low = tl.load(span + 3 * batch + 1)
        high = tl.load(span + 3 * batch + 2)
        dense_high = high
    if CAUSAL:
        high = tl.minimum(high, first_query + BLOCK_M + offset)
        dense_high = tl.minimum(dense_high, first_query + 1 + offset)
    begin = low // BLOCK_N
    end = tl.maximum(begin, tl.cdiv(tl.maximum(high, 0), BLOCK_N))
    dense = tl.minimum(tl.cdiv(dense_low, BLOCK_N), end)
    dense_end = tl.maximum(dense, tl.maximum(dense_high, 0) // BLOCK_N)
    return begin, dense, dense_end, end


@triton.jit
def visible_query_tiles(
    first_key, T, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr
):
    """The query tiles that see keys [first_key, first_key + BLOCK_N): begin, dense, dense_end, end."""
    begin, dense = 0, 0
    end = tl.cdiv(T, BLOCK_M)
    dense_end = T // BLOCK_M
    if CAUSAL:
        begin = tl.minimum(tl.maximum(first_key - offset, 0) // BLOCK_M, end)
        dense = tl.minimum(tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - offset, 0), BLOCK_M), end)
        dense_end = tl.maximum(dense, dense_end)
    return begin, dense, dense_end, end


@triton.jit
def masked_tile(i, begin, dense, dense_end):
    """The i-th of the tiles that need a mask."""
    return tl.where(i < dense - begin, begin + i, dense_end + i - (dense - begin))


@triton.jit
def offsets(ROWS: tl.constexpr, D: tl.constexpr, stride):
    """Of a tile's elements from its first row."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, D)[None, :]


@triton.jit
def load(pointers, mask, UPCAST: tl.constexpr):
    """0 where masked. `UPCAST`: the interpreter computes wrongly in bfloat16."""
    x = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def dot(a, b, acc=None):
    """Matrix product in float32; operands of float32 are not rounded to TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["S"])
def key_span_kernel(key_mask, span, stride_mb, S, BLOCK: tl.constexpr):
    """Where the keys lie that a row of the mask allows: the first, and one past the last, as entries 0 and 2.

    Entry 1 is where they have no gap from there on: the first, or the end where there is a gap.
    """
    row = tl.program_id(0)
    key_mask += row.to(tl.int64) * stride_mb
    low, high, count = S, 0, 0
    for start in range(0, S, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        keep = tl.load(key_mask + keys, mask=keys < S, other=0) != 0
        low = tl.minimum(low, tl.min(tl.where(keep, keys, S)))
        high = tl.maximum(high, tl.max(tl.where(keep, keys + 1, 0)))
        count += tl.sum(keep.to(tl.int32))
    low = tl.minimum(low, high)
    tl.store(span + 3 * row, low)
    tl.store(span + 3 * row + 1, tl.where(high - low == count, low, high))
    tl.store(span + 3 * row + 2, high)
