"""What the attention kernels share: the order of programs, which tiles need a mask, loads and products.

A loop over tiles comes in two halves. Tiles [dense, dense_end) need no mask at all; those of [begin, dense)
and [dense_end, end), which are the causal diagonal, ragged ends and the edges of a window or a key mask, do:
a second loop takes both.

A head of D elements is a tile WIDTH columns wide, the next power of 2. With rotary embeddings each half of a
turned head takes one half of the tile: products of two such tiles are those of the heads.
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
    span, batch, first_query, S, offset, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
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
    if HAS_WINDOW:
        low = tl.maximum(low, first_query + offset - window + 1)
        dense_low = tl.maximum(dense_low, first_query + BLOCK_M + offset - window)
        if not CAUSAL:
            high = tl.minimum(high, first_query + BLOCK_M - 1 + offset + window)
            dense_high = tl.minimum(dense_high, first_query + offset + window)
    begin = low // BLOCK_N
    end = tl.maximum(begin, tl.cdiv(tl.maximum(high, 0), BLOCK_N))
    dense = tl.minimum(tl.cdiv(dense_low, BLOCK_N), end)
    dense_end = tl.maximum(dense, tl.maximum(dense_high, 0) // BLOCK_N)
    return begin, dense, dense_end, end


@triton.jit
def visible_query_tiles(
    first_key, T, offset, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """The query tiles that see keys [first_key, first_key + BLOCK_N): begin, dense, dense_end, end."""
    begin, dense = 0, 0
    end = tl.cdiv(T, BLOCK_M)
    dense_end = T // BLOCK_M
    if HAS_WINDOW:
        end = tl.cdiv(tl.maximum(tl.minimum(T, first_key + BLOCK_N - 1 - offset + window), 0), BLOCK_M)
        dense_end = tl.maximum(tl.minimum(T, first_key - offset + window), 0) // BLOCK_M
        if not CAUSAL:
            begin = tl.minimum(tl.maximum(first_key - offset - window + 1, 0) // BLOCK_M, end)
            dense = tl.maximum(first_key + BLOCK_N - offset - window, 0)
            dense = tl.minimum(tl.cdiv(dense, BLOCK_M), end)
            dense_end = tl.maximum(dense, dense_end)
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
def _both(a, b):
    return b if a is None else a & b


@triton.jit
def seen(keys, queries, window, keep, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """`keep` (None: all), and which keys the queries see, both counted from the first key."""
    if CAUSAL:
        keep = _both(keep, keys <= queries)
    if HAS_WINDOW:
        keep = _both(keep, keys > queries - window)
        if not CAUSAL:
            keep = _both(keep, keys < queries + window)
    return keep


@triton.jit
def load(pointers, mask, UPCAST: tl.constexpr):
    """0 where masked. `UPCAST`: the interpreter computes wrongly in bfloat16."""
    x = tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _inside(rows, FIRST: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr):
    """Which elements of a tile exist: those of the rows, None for all, and columns [FIRST, LAST)."""
    mask = None
    if rows is not None:
        mask = rows[:, None]
    if LAST - FIRST != WIDTH:
        columns = (tl.arange(0, WIDTH) < LAST - FIRST)[None, :]
        mask = columns if mask is None else mask & columns
    return mask


@triton.jit
def _pointers(x, stride, ROWS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    return x + FIRST + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, WIDTH)[None, :])


@triton.jit
def _load(x, stride, rows, ROWS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, WIDTH: tl.constexpr):
    return load(_pointers(x, stride, ROWS, FIRST, WIDTH), _inside(rows, FIRST, LAST, WIDTH), False)


@triton.jit
def load_tile(
    x, stride, rows, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, UPCAST: tl.constexpr
):
    """A tile whose first row is at x; 0 where `rows` is False."""
    tile = _load(x, stride, rows, ROWS, 0, D, WIDTH)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def store_tile(x, stride, rows, tile, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Writes a tile whose first row is at x."""
    mask = _inside(rows, 0, D, WIDTH)
    tl.store(_pointers(x, stride, ROWS, 0, WIDTH), tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _table(table, rows, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    return _load(table, D // 2, rows, ROWS, 0, D // 2, WIDTH // 2)


@triton.jit
def load_turned(
    x, cos, sin, stride, rows,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of queries or keys, turned by the rows of their table that begin at cos and sin."""
    if not ROTARY:
        return load_tile(x, stride, rows, ROWS, D, WIDTH, UPCAST)
    else:
        a = _load(x, stride, rows, ROWS, 0, D // 2, WIDTH // 2).to(tl.float32)
        b = _load(x, stride, rows, ROWS, D // 2, D, WIDTH // 2).to(tl.float32)
        c = _table(cos, rows, ROWS, D, WIDTH)
        s = _table(sin, rows, ROWS, D, WIDTH)
        pair = tl.join(a * c - b * s, b * c + a * s)
        turned = tl.reshape(tl.permute(pair, (0, 2, 1)), (ROWS, WIDTH)).to(x.dtype.element_ty)
        return turned.to(tl.float32) if UPCAST else turned


@triton.jit
def store_turned_back(
    x, cos, sin, stride, rows, tile,
    ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of what `load_turned` read."""
    if not ROTARY:
        store_tile(x, stride, rows, tile, ROWS, D, WIDTH)
    else:
        a, b = tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, WIDTH // 2)), (0, 2, 1)))
        c = _table(cos, rows, ROWS, D, WIDTH)
        s = _table(sin, rows, ROWS, D, WIDTH)
        mask = _inside(rows, 0, D // 2, WIDTH // 2)
        element = x.dtype.element_ty
        tl.store(_pointers(x, stride, ROWS, 0, WIDTH // 2), (a * c + b * s).to(element), mask=mask)
        tl.store(_pointers(x, stride, ROWS, D // 2, WIDTH // 2), (b * c - a * s).to(element), mask=mask)


@triton.jit
def dot(a, b, acc=None):
    """Matrix product in float32; operands of float32 are not rounded to TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tanh(x):
    """By exp2, and near 0, where that would lose digits, by its series."""
    shrink = tl.exp2(tl.abs(x) * -2.8853900817779268)  # e^-2|x|
    far = (1.0 - shrink) / (1.0 + shrink)
    square = x * x
    near = x * (1.0 + square * (-1 / 3 + square * (2 / 15 - square * (17 / 315))))
    return tl.where(square < 0.04, near, tl.where(x < 0, -far, far))


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
