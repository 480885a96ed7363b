"""The forward kernel for Hopper: warps that copy and warps that compute (FlashAttention-3, arXiv:2407.08608).

One warp, the producer, does nothing but start copies (TMA) into a ring of shared memory; each consumer, a
warpgroup of four warps, holds 64 queries and runs the matrix products (wgmma). Barriers in shared memory say
which slot is full and which is free again: a wait names the parity of the phase it waits for, and of a fresh
barrier the phase before the first counts as over.

A step issues the scores of its tile of keys and the product of the weights of the tile before, so that the
latter runs while the softmax of the former is taken. The tiles that need a mask come first, in a loop apart.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from rlhf_kernels.ops.attention.gluon_tiles import (
    AT_CAP,
    AT_MASK,
    BLOCK_M,
    CONSUMERS,
    ROWS,
    WARPS,
    key_tile,
    operand,
    seen_keys,
    turn,
    wait_cleared,
)
from rlhf_kernels.ops.attention.triton_tiles import tanh, tile_and_head, visible_key_tiles

LN2 = gl.constexpr(0.6931471805599453)
# The maximum of a row that has seen no key: finite, so that it can be subtracted from a masked score of -inf.
LOWEST = gl.constexpr(-3.4028234663852886e38)


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, memory, barriers, tiles, n, place, group,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: copies the queries of every consumer, then the tiles of keys and values."""
    q_smem, k_smem, v_smem = memory
    q_full, k_full, k_empty, v_full, v_empty, _ = barriers
    batch, head, first = place
    mbarrier.expect(q_full, CONSUMERS * q_desc.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        at = [batch, head, first + c * ROWS, 0]
        tma.async_copy_global_to_shared(q_desc, at, q_full, q_smem.index(c))
    for i in range(n):
        slot = i % STAGES
        free = (i // STAGES + 1) & 1
        at = [batch, group, key_tile(i, tiles) * BLOCK_N, 0]
        mbarrier.wait(k_empty.index(slot), free)
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, at, k_full.index(slot), k_smem.index(slot))
        mbarrier.wait(v_empty.index(slot), free)
        mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, at, v_full.index(slot), v_smem.index(slot))


@gluon.jit
def _softmax(
    scores, top, total, queries, key_mask, first_key, sizes, FLAGS: gl.constexpr,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Takes a tile of scores in: its weights, the new state, and the factor by which what was shrinks."""
    T, S, window, scale, cap = sizes
    if FLAGS[AT_CAP]:
        scores = tanh(scores * scale)
        scale = cap
    if MASKED:
        see = seen_keys(queries, key_mask, first_key, S, S - T, window, FLAGS, BLOCK_N, LAYOUT)
        scores = gl.where(see, scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - higher[:, None])
    shrink = gl.exp2(top - higher)
    return weights, higher, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _pinned(x):
    """x, which is at least 0 or NaN, through an instruction that ptxas moves no wait across.

    Without it the softmax comes after the wait for the product that it should run beside. The mask of the
    warp barrier is always full, but follows from x.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .b32 m; .reg .pred q; setp.lt.f32 q, $1, 0f00000000; selp.b32 m, 1, -1, q; "
        "bar.warp.sync m; mov.b32 $0, $1; }",
        "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _step(
    i, acc, weights, top, total, q_tile, memory, barriers, tiles, queries, key_mask, sizes,
    FLAGS: gl.constexpr, INDEX: gl.constexpr, MASKED: gl.constexpr, PINNED: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Scores and weights of the i-th tile beside the product of the weights and values of the tile before."""
    _, k_smem, v_smem = memory
    _, k_full, k_empty, v_full, v_empty, v_clear = barriers
    slot = i % STAGES
    phase = (i // STAGES) & 1
    before = (i - 1) % STAGES
    mbarrier.wait(k_full.index(slot), phase)
    k_tile = k_smem.index(slot).reshape([BLOCK_N, D])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
    v_tile = v_smem.index(before).reshape([BLOCK_N, D])
    acc = warpgroup_mma(weights, v_tile, acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(slot))

    first_key = key_tile(i, tiles) * BLOCK_N
    next_weights, top, total, shrink = _softmax(
        scores, top, total, queries, key_mask, first_key, sizes, FLAGS, MASKED, BLOCK_N, SCORES
    )
    if PINNED:
        total = _pinned(total)
    acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))
    mbarrier.arrive(v_empty.index(before))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
    if MASKED and FLAGS[AT_MASK]:
        wait_cleared(i, v_smem, v_full, v_clear, key_mask, first_key, sizes[1], INDEX, D, BLOCK_N, STAGES)
    return acc, operand(next_weights, v_smem.dtype, OUT), top, total


@gluon.jit
def _consume(
    out_desc, lse, key_mask, tables, memory, barriers, tiles, n, place, sizes, FLAGS: gl.constexpr,
    INDEX: gl.constexpr, PINNED: gl.constexpr, ROTARY: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One consumer: output and log-sum-exp of its 64 queries; `lse` is that of the head."""
    q_smem, k_smem, v_smem = memory
    q_full, k_full, k_empty, v_full, _, v_clear = barriers
    batch, head, first = place
    T, S, _, _, _ = sizes
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    row = first + INDEX * ROWS
    queries = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    acc = gl.zeros([ROWS, D], gl.float32, OUT)
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    top = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))

    mbarrier.wait(q_full, 0)
    q_tile = q_smem.index(INDEX).reshape([ROWS, D])
    if ROTARY:
        turn(q_tile, tables, batch, row, T, ROWS, D)
    mbarrier.wait(k_full.index(0), 0)
    k_tile = k_smem.index(0).reshape([BLOCK_N, D])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0))
    first_key = key_tile(0, tiles) * BLOCK_N
    # With a mask whatever tile it is: where no key is seen at all it makes the row empty.
    weights, top, total, _ = _softmax(
        scores, top, total, queries, key_mask, first_key, sizes, FLAGS, True, BLOCK_N, SCORES
    )
    if FLAGS[AT_MASK]:
        wait_cleared(0, v_smem, v_full, v_clear, key_mask, first_key, S, INDEX, D, BLOCK_N, STAGES)
    weights = operand(weights, v_smem.dtype, OUT)
    n_masked = tiles[3]
    for i in range(1, n_masked):
        acc, weights, top, total = _step(
            i, acc, weights, top, total, q_tile, memory, barriers, tiles, queries, key_mask, sizes, FLAGS,
            INDEX, True, PINNED, D, BLOCK_N, STAGES, SCORES, OUT,
        )  # fmt: skip
    for i in range(gl.maximum(n_masked, 1), n):
        acc, weights, top, total = _step(
            i, acc, weights, top, total, q_tile, memory, barriers, tiles, queries, key_mask, sizes, FLAGS,
            INDEX, False, PINNED, D, BLOCK_N, STAGES, SCORES, OUT,
        )  # fmt: skip
    last = (n - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((n - 1) // STAGES) & 1)
    acc = warpgroup_mma(weights, v_smem.index(last).reshape([BLOCK_N, D]), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))

    empty = total == 0
    logs = gl.where(empty, float("-inf"), (top + gl.log2(total)) * LN2)
    gl.store(lse + queries, logs, mask=queries < T)
    share = 1.0 / gl.where(empty, 1.0, total)
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, OUT))[:, None]
    # The queries have been read for the last time: the output leaves from where they lay.
    q_tile.store(acc.to(q_smem.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [batch, head, row, 0], q_smem.index(INDEX))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_heads", "H", "group_size", "T", "S", "window", "heads_per_wave"])
def forward_kernel(
    q_desc, k_desc, v_desc, out_desc, key_mask, span, q_cos, q_sin, lse, scale_log2, cap, stride_mb,
    stride_qcb, n_heads, H, group_size, T, S, window, heads_per_wave,
    CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr,
    ROTARY: gl.constexpr, PINNED: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of 64 queries of one head for each consumer."""
    n_tiles = gl.cdiv(T, BLOCK_M)
    rank, at = tile_and_head(n_tiles, n_heads, heads_per_wave)
    first = (n_tiles - 1 - rank) * BLOCK_M
    batch = at // H
    head = at % H
    if HAS_MASK:
        key_mask += batch.to(gl.int64) * stride_mb
    begin, dense, dense_end, end = visible_key_tiles(
        span, batch, first, S, S - T, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_MASK, HAS_WINDOW
    )
    n_masked = end - begin - (dense_end - dense)
    n = gl.maximum(end - begin, 1)

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_clear = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=CONSUMERS)
        mbarrier.init(v_empty.index(slot), count=CONSUMERS)
        mbarrier.init(v_clear.index(slot), count=1)
    fence_async_shared()

    lse += at.to(gl.int64) * T
    tiles = (begin, dense, dense_end, n_masked)
    memory = (q_smem, k_smem, v_smem)
    barriers = (q_full, k_full, k_empty, v_full, v_empty, v_clear)
    place = (batch, head, first)
    sizes = (T, S, window, scale_log2, cap)
    FLAGS: gl.constexpr = (CAUSAL, HAS_MASK, HAS_WINDOW, HAS_CAP)
    tables = (q_cos, q_sin, stride_qcb)
    gl.warp_specialize(
        [
            (_consume, (out_desc, lse, key_mask, tables, memory, barriers, tiles, n, place, sizes, FLAGS,
                        0, PINNED, ROTARY, D, BLOCK_N, STAGES)),
            (_consume, (out_desc, lse, key_mask, tables, memory, barriers, tiles, n, place, sizes, FLAGS,
                        1, PINNED, ROTARY, D, BLOCK_N, STAGES)),
            (_produce, (q_desc, k_desc, v_desc, memory, barriers, tiles, n, place, head // group_size,
                        BLOCK_N, STAGES)),
        ],
        [WARPS, 1],
        [240, 24],
    )  # fmt: skip
