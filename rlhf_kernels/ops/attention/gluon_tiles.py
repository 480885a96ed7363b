"""What the Hopper kernels share: the order of tiles, masks, and queries that are turned where they lie."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from rlhf_kernels.ops.attention.triton_tiles import masked_tile, seen

WARPS = gl.constexpr(4)  # of a warpgroup
ROWS = gl.constexpr(64)  # queries of a consumer: what one wgmma holds
CONSUMERS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)
# Where a kernel's flags stand in the tuple that is handed on.
AT_CAUSAL, AT_MASK, AT_WINDOW, AT_CAP = (gl.constexpr(i) for i in range(4))


@gluon.jit
def key_tile(i, tiles):
    """The i-th tile of keys: those that need a mask, then the others."""
    begin, dense, dense_end, n_masked = tiles
    return gl.where(i < n_masked, masked_tile(i, begin, dense, dense_end), dense + i - n_masked)


@gluon.jit
def _clear(tile, key_mask, first_key, S, D: gl.constexpr, BLOCK_N: gl.constexpr):
    """Sets rows of masked keys to 0 where they lie: weight 0 times NaN would be NaN."""
    PER_ROW: gl.constexpr = D // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // PER_ROW, PER_ROW], [WARPS, 1], [1, 0])
    keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, layout))
    keep = gl.load(key_mask + keys, mask=keys < S, other=0) != 0
    values = tile.load(layout)
    tile.store(gl.where(keep[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
def wait_cleared(
    i, smem, full, cleared, key_mask, first_key, S,
    INDEX: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Waits for the i-th tile of a ring; the first consumer clears it of masked keys for all."""
    slot = i % STAGES
    phase = (i // STAGES) & 1
    if INDEX == 0:
        mbarrier.wait(full.index(slot), phase)
        _clear(smem.index(slot).reshape([BLOCK_N, D]), key_mask, first_key, S, D, BLOCK_N)
        mbarrier.arrive(cleared.index(slot))
    else:
        mbarrier.wait(cleared.index(slot), phase)


@gluon.jit
def seen_keys(
    queries, key_mask, first_key, S, offset, window,
    FLAGS: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Which keys of a tile the queries see."""
    keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    keep = keys < S
    if FLAGS[AT_MASK]:
        keep = gl.load(key_mask + keys, mask=keep, other=0) != 0
    places = (queries + offset)[:, None]
    return seen(keys[None, :], places, window, keep[None, :], FLAGS[AT_CAUSAL], FLAGS[AT_WINDOW])


@gluon.jit
def operand(weights, dtype: gl.constexpr, OUT: gl.constexpr):
    """Weights as the left operand of the second product: where the scores lie they lie right."""
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, OUT, 2))


@gluon.jit
def _tables(tables, batch, first, end, N: gl.constexpr, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """cos and sin of N positions from `first` on, 0 from `end` on."""
    cos, sin, stride = tables
    cos += batch.to(gl.int64) * stride
    sin += batch.to(gl.int64) * stride
    rows = first + gl.arange(0, N, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, HALF, layout=gl.SliceLayout(0, LAYOUT))
    at = rows[:, None] * HALF + columns[None, :]
    inside = (rows < end)[:, None]
    return gl.load(cos + at, mask=inside, other=0.0), gl.load(sin + at, mask=inside, other=0.0)


@gluon.jit
def turn(tile, tables, batch, first, end, N: gl.constexpr, D: gl.constexpr):
    """Turns N queries where they lie, of which the first is the row `first` of its table."""
    HALF: gl.constexpr = D // 2
    CHUNKS: gl.constexpr = HALF // 8
    ORDER: gl.constexpr = [0, 1] if D == 64 else [1, 0]  # with these, no two threads ask for one bank
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // CHUNKS, CHUNKS], [WARPS, 1], ORDER)
    cos, sin = _tables(tables, batch, first, end, N, HALF, LAYOUT)
    left, right = tile.slice(0, HALF, 1), tile.slice(HALF, HALF, 1)
    a, b = left.load(LAYOUT).to(gl.float32), right.load(LAYOUT).to(gl.float32)
    left.store((a * cos - b * sin).to(tile.dtype))
    right.store((b * cos + a * sin).to(tile.dtype))
    fence_async_shared()


@gluon.jit
def store_turned_back(
    tile, x, tables, batch, first, end,
    ROTARY: gl.constexpr, N: gl.constexpr, D: gl.constexpr, NUM_WARPS: gl.constexpr,
):  # fmt: skip
    """Writes the gradient of N turned rows, an accumulator, to shared memory: a pair is in one thread."""
    if ROTARY:
        HALF: gl.constexpr = D // 2
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, HALF, 16])
        a, b = gl.split(gl.permute(gl.reshape(x, [N, 2, HALF]), [0, 2, 1]))
        a = gl.convert_layout(a, LAYOUT, assert_trivial=True)
        b = gl.convert_layout(b, LAYOUT, assert_trivial=True)
        cos, sin = _tables(tables, batch, first, end, N, HALF, LAYOUT)
        tile.slice(0, HALF, 1).store((a * cos + b * sin).to(tile.dtype))
        tile.slice(HALF, HALF, 1).store((b * cos - a * sin).to(tile.dtype))
    else:
        tile.store(x.to(tile.dtype))
    fence_async_shared()
