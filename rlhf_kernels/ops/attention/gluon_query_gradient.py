"""The backward kernel for Hopper that gives dQ, with the roles of gluon_forward.py: it walks over the keys.

The formulas are those of triton_backward.py. It runs first and leaves shift and delta for dK and dV.
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
    store_turned_back,
    turn,
    wait_cleared,
)
from rlhf_kernels.ops.attention.triton_tiles import tanh, tile_and_head, visible_key_tiles

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _produce(
    q_desc, do_desc, out_desc, k_desc, v_desc, memory, barriers, tiles, n, place, group,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: copies what the consumers hold of their queries, then the tiles of keys and values."""
    q_smem, do_smem, out_smem, k_smem, v_smem = memory
    q_full, k_full, k_empty, v_full, v_empty, _ = barriers
    batch, head, first = place
    mbarrier.expect(q_full, 3 * CONSUMERS * q_desc.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        at = [batch, head, first + c * ROWS, 0]
        tma.async_copy_global_to_shared(q_desc, at, q_full, q_smem.index(c))
        tma.async_copy_global_to_shared(do_desc, at, q_full, do_smem.index(c))
        tma.async_copy_global_to_shared(out_desc, at, q_full, out_smem.index(c))
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
def _step(
    i, dq, q_tile, do_tile, shift, delta, memory, barriers, tiles, queries, key_mask, sizes,
    FLAGS: gl.constexpr, INDEX: gl.constexpr, MASKED: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Adds what the i-th tile of keys contributes to dQ."""
    _, _, _, k_smem, v_smem = memory
    _, k_full, k_empty, v_full, v_empty, k_clear = barriers
    T, S, window, _, scale, cap = sizes
    slot = i % STAGES
    phase = (i // STAGES) & 1
    first_key = key_tile(i, tiles) * BLOCK_N
    if MASKED and FLAGS[AT_MASK]:
        wait_cleared(i, k_smem, k_full, k_clear, key_mask, first_key, S, INDEX, D, BLOCK_N, STAGES)
    else:
        mbarrier.wait(k_full.index(slot), phase)
    k_tile = k_smem.index(slot).reshape([BLOCK_N, D])
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot), phase)
    v_tile = v_smem.index(slot).reshape([BLOCK_N, D])
    dp = warpgroup_mma(do_tile, v_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    if FLAGS[AT_CAP]:
        bent = tanh(scores * scale)
        slope = gl.exp2(bent * cap - shift[:, None]) * (1.0 - bent * bent)
    else:
        slope = gl.exp2(scores * scale - shift[:, None])
    dp = warpgroup_mma_wait(0, deps=(dp,))
    mbarrier.arrive(v_empty.index(slot))
    ds = slope * (dp - delta[:, None])
    if MASKED:
        see = seen_keys(queries, key_mask, first_key, S, S - T, window, FLAGS, BLOCK_N, SCORES)
        ds = gl.where(see, ds, 0.0)
    left = operand(ds, k_smem.dtype, OUT)
    dq = warpgroup_mma(left, k_tile, dq, is_async=True)
    dq, left = warpgroup_mma_wait(0, deps=(dq, left))
    mbarrier.arrive(k_empty.index(slot))
    return dq


@gluon.jit
def _delta(do_tile, out_tile, D: gl.constexpr, SCORES: gl.constexpr):
    """The row sums of out * grad_out."""
    PER_ROW: gl.constexpr = D // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // PER_ROW, PER_ROW], [WARPS, 1], [1, 0])
    product = do_tile.load(layout).to(gl.float32) * out_tile.load(layout).to(gl.float32)
    return gl.convert_layout(gl.sum(product, 1), gl.SliceLayout(1, SCORES))


@gluon.jit
def _consume(
    dq_desc, turned_desc, lse, grad_lse, key_mask, tables, shift_out, delta_out, memory, barriers, tiles, n,
    place, sizes, FLAGS: gl.constexpr, INDEX: gl.constexpr, HAS_GRAD_LSE: gl.constexpr,
    ROTARY: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One consumer: dQ, shift and delta of its 64 queries; what is 1-D is that of the head."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    q_smem, do_smem, out_smem, _, _ = memory
    batch, head, first = place
    T, _, _, scale, _, _ = sizes
    row = first + INDEX * ROWS
    queries = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
    inside = queries < T
    logs = gl.load(lse + queries, mask=inside, other=float("-inf"))
    shift = gl.where(logs == float("-inf"), float("inf"), logs * LOG2E)
    dq = gl.zeros([ROWS, D], gl.float32, OUT)

    mbarrier.wait(barriers[0], 0)
    q_tile = q_smem.index(INDEX).reshape([ROWS, D])
    do_tile = do_smem.index(INDEX).reshape([ROWS, D])
    if ROTARY:
        # Also for dK, which reads every query many times.
        turn(q_tile, tables, batch, row, T, ROWS, D)
        tma.async_copy_shared_to_global(turned_desc, [batch, head, row, 0], q_smem.index(INDEX))
    delta = _delta(do_tile, out_smem.index(INDEX).reshape([ROWS, D]), D, SCORES)
    if HAS_GRAD_LSE:
        delta = delta - gl.load(grad_lse + queries, mask=inside, other=0.0)
    gl.store(shift_out + queries, shift)
    gl.store(delta_out + queries, delta)
    n_masked = tiles[3]
    for i in range(0, n_masked):
        dq = _step(
            i, dq, q_tile, do_tile, shift, delta, memory, barriers, tiles, queries, key_mask, sizes,
            FLAGS, INDEX, True, D, BLOCK_N, STAGES, SCORES, OUT,
        )  # fmt: skip
    for i in range(n_masked, n):
        dq = _step(
            i, dq, q_tile, do_tile, shift, delta, memory, barriers, tiles, queries, key_mask, sizes,
            FLAGS, INDEX, False, D, BLOCK_N, STAGES, SCORES, OUT,
        )  # fmt: skip

    # The queries have been read for the last time: their gradient leaves from where they lay.
    if ROTARY:
        tma.store_wait(0)
    store_turned_back(q_tile, dq * scale, tables, batch, row, T, ROTARY, ROWS, D, WARPS)
    tma.async_copy_shared_to_global(dq_desc, [batch, head, row, 0], q_smem.index(INDEX))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_heads", "H", "group_size", "T", "S", "window", "heads_per_wave"])
def query_gradient_kernel(
    q_desc, k_desc, v_desc, out_desc, do_desc, dq_desc, turned_desc, key_mask, span, q_cos, q_sin, lse,
    grad_lse, shift, delta, scale, scale_log2, cap, stride_mb, stride_qcb, row_pitch,
    n_heads, H, group_size, T, S, window, heads_per_wave,
    CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr,
    ROTARY: gl.constexpr, HAS_GRAD_LSE: gl.constexpr,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of 64 queries of one head for each consumer, and their shift and delta, pads included.

    With rotary embeddings also the turned queries, for the next kernel; the keys come turned.
    """
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

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(do_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], do_desc.layout)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], out_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_clear = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=CONSUMERS)
        mbarrier.init(v_empty.index(slot), count=CONSUMERS)
        mbarrier.init(k_clear.index(slot), count=1)
    fence_async_shared()

    lse += at.to(gl.int64) * T
    if HAS_GRAD_LSE:
        grad_lse += at.to(gl.int64) * T
    shift += at.to(gl.int64) * row_pitch
    delta += at.to(gl.int64) * row_pitch
    tiles = (begin, dense, dense_end, n_masked)
    memory = (q_smem, do_smem, out_smem, k_smem, v_smem)
    barriers = (q_full, k_full, k_empty, v_full, v_empty, k_clear)
    n = end - begin
    place = (batch, head, first)
    sizes = (T, S, window, scale, scale_log2, cap)
    FLAGS: gl.constexpr = (CAUSAL, HAS_MASK, HAS_WINDOW, HAS_CAP)
    tables = (q_cos, q_sin, stride_qcb)
    gl.warp_specialize(
        [
            (_consume, (dq_desc, turned_desc, lse, grad_lse, key_mask, tables, shift, delta, memory, barriers,
                        tiles, n, place, sizes, FLAGS, 0, HAS_GRAD_LSE, ROTARY, D, BLOCK_N, STAGES)),
            (_consume, (dq_desc, turned_desc, lse, grad_lse, key_mask, tables, shift, delta, memory, barriers,
                        tiles, n, place, sizes, FLAGS, 1, HAS_GRAD_LSE, ROTARY, D, BLOCK_N, STAGES)),
            (_produce, (q_desc, do_desc, out_desc, k_desc, v_desc, memory, barriers, tiles, n, place,
                        head // group_size, BLOCK_N, STAGES)),
        ],
        [WARPS, 1],
        [232, 40],
    )  # fmt: skip
