"""The backward kernel for Hopper that gives dK and dV of a tile of keys: one warp copies, eight compute.

gluon_query_gradient.py runs first and leaves shift and delta; the formulas are those of triton_backward.py.
Scores are held transposed, keys by queries: weights and ds then lie in registers as the left operands that
they become, and every key is a row of its own, so that what a masked slot holds stays in that row. A program
adds up over its queries by itself, in one order: no atomics, the same bits in every run.
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
    AT_CAUSAL,
    AT_MASK,
    AT_WINDOW,
    store_turned_back,
)
from rlhf_kernels.ops.attention.triton_tiles import (
    masked_tile,
    seen,
    tanh,
    tile_and_head,
    visible_query_tiles,
)

WARPS = gl.constexpr(8)  # of the consumer: two warpgroups, 64 keys each
KEYS = gl.constexpr(128)
QUERIES = gl.constexpr(64)  # of a step


@gluon.jit
def _where(i, tiles):
    """The head in its group and the first query of the i-th step: tiles without a mask, then the others."""
    begin, dense, dense_end, end, group_size = tiles
    n_dense = dense_end - dense
    n_masked = end - begin - n_dense
    j = i - n_dense * group_size
    if j < 0:
        head = i // n_dense
        tile = dense + i % n_dense
    else:
        head = j // n_masked
        tile = masked_tile(j % n_masked, begin, dense, dense_end)
    return head, tile * QUERIES


@gluon.jit
def _produce(
    k_desc, v_desc, q_desc, do_desc, memory, barriers, tiles, n, place, STAGES: gl.constexpr
):  # fmt: skip
    """The producer: copies the keys and values, then the queries and gradients of every step."""
    k_smem, v_smem, q_smem, do_smem = memory
    kv_full, q_full, do_full, empty = barriers
    batch, group, first_head, first_key = place
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [batch, group, first_key, 0], kv_full, k_smem)
    tma.async_copy_global_to_shared(v_desc, [batch, group, first_key, 0], kv_full, v_smem)
    for i in range(n):
        slot = i % STAGES
        head, query = _where(i, tiles)
        mbarrier.wait(empty.index(slot), (i // STAGES + 1) & 1)
        mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes)
        at = [batch, first_head + head, query, 0]
        tma.async_copy_global_to_shared(q_desc, at, q_full.index(slot), q_smem.index(slot))
        mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(do_desc, at, do_full.index(slot), do_smem.index(slot))


@gluon.jit
def _step(
    i, dk, dv, k_tile, v_tile, shift, delta, memory, barriers, tiles, keys, sizes,
    FLAGS: gl.constexpr, MASKED: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SCORES: gl.constexpr, OUT: gl.constexpr,
):  # fmt: skip
    """Adds what one tile of queries contributes to dK and dV."""
    _, _, q_smem, do_smem = memory
    _, q_full, do_full, empty = barriers
    T, S, window, row_pitch, _, scale, cap = sizes
    slot = i % STAGES
    phase = (i // STAGES) & 1
    head, query = _where(i, tiles)
    lanes = query + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, SCORES))
    row = head.to(gl.int64) * row_pitch
    zero = gl.zeros([KEYS, QUERIES], gl.float32, SCORES)
    mbarrier.wait(q_full.index(slot), phase)
    q_tile = q_smem.index(slot).reshape([QUERIES, D])
    scores = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(slot), phase)
    do_tile = do_smem.index(slot).reshape([QUERIES, D])
    # The cap and heads of 128 together leave no registers for both products at once.
    APART: gl.constexpr = FLAGS[AT_CAP] and D == 128
    if not APART:
        dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    # Behind the last query shift is infinity, and the weights 0.
    shift_tile = gl.load(shift + row + lanes)

    scores = warpgroup_mma_wait(0 if APART else 1, deps=(scores,))
    if FLAGS[AT_CAP]:
        scores = tanh(scores * scale)
        weights = gl.exp2(scores * cap - shift_tile[None, :])
    else:
        weights = gl.exp2(scores * scale - shift_tile[None, :])
    if MASKED and (FLAGS[AT_CAUSAL] or FLAGS[AT_WINDOW]):
        places = (lanes + S - T)[None, :]
        see = seen(keys[:, None], places, window, None, FLAGS[AT_CAUSAL], FLAGS[AT_WINDOW])
        weights = gl.where(see, weights, 0.0)
    left = gl.convert_layout(weights.to(q_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
    if FLAGS[AT_CAP]:
        weights = weights * (1.0 - scores * scores)
    if APART:
        dp = warpgroup_mma(v_tile, do_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    dv = warpgroup_mma(left, do_tile, dv, is_async=True)
    # Late, since registers are full until here.
    delta_tile = gl.load(delta + row + lanes)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = weights * (dp - delta_tile[None, :])
    right = gl.convert_layout(ds.to(q_smem.dtype), gl.DotOperandLayout(0, OUT, 2))
    dk = warpgroup_mma(right, q_tile, dk, is_async=True)
    dv, dk, left, right = warpgroup_mma_wait(0, deps=(dv, dk, left, right))
    mbarrier.arrive(empty.index(slot))
    return dk, dv


@gluon.jit
def _consume(
    dk_desc, dv_desc, key_mask, tables, shift, delta, memory, barriers, tiles, n, place, sizes,
    FLAGS: gl.constexpr, ROTARY: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The consumer: dK and dV of 128 keys; `shift` and `delta` are those of the group's first head."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, QUERIES, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    k_smem, v_smem, _, _ = memory
    batch, group, _, first_key = place
    _, S, _, _, scale, _, _ = sizes
    _, dense, dense_end, _, group_size = tiles
    keys = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, SCORES))
    dk = gl.zeros([KEYS, D], gl.float32, OUT)
    dv = gl.zeros([KEYS, D], gl.float32, OUT)
    mbarrier.wait(barriers[0], 0)
    k_tile = k_smem.reshape([KEYS, D])
    v_tile = v_smem.reshape([KEYS, D])
    n_dense = (dense_end - dense) * group_size
    for i in range(0, n_dense):
        dk, dv = _step(
            i, dk, dv, k_tile, v_tile, shift, delta, memory, barriers, tiles, keys, sizes,
            FLAGS, False, D, STAGES, SCORES, OUT,
        )  # fmt: skip
    for i in range(n_dense, n):
        dk, dv = _step(
            i, dk, dv, k_tile, v_tile, shift, delta, memory, barriers, tiles, keys, sizes,
            FLAGS, True, D, STAGES, SCORES, OUT,
        )  # fmt: skip

    dk = dk * scale
    if FLAGS[AT_MASK]:
        rows = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, OUT))
        keep = (gl.load(key_mask + rows, mask=rows < S, other=0) != 0)[:, None]
        dk = gl.where(keep, dk, 0.0)
        dv = gl.where(keep, dv, 0.0)
    # Every product has read keys and values: the gradients leave from where they lay.
    v_tile.store(dv.to(v_smem.dtype))
    store_turned_back(k_tile, dk, tables, batch, first_key, S, ROTARY, KEYS, D, WARPS)
    tma.async_copy_shared_to_global(dk_desc, [batch, group, first_key, 0], k_smem)
    tma.async_copy_shared_to_global(dv_desc, [batch, group, first_key, 0], v_smem)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["n_groups", "G", "group_size", "T", "S", "window", "heads_per_wave"])
def key_gradient_kernel(
    q_desc, k_desc, v_desc, do_desc, dk_desc, dv_desc, key_mask, k_cos, k_sin, shift, delta,
    scale, scale_log2, cap, stride_mb, stride_kcb, row_pitch,
    n_groups, G, group_size, T, S, window, heads_per_wave,
    CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_CAP: gl.constexpr,
    ROTARY: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one group, from every query head that reads it.

    With rotary embeddings queries and keys come turned, and dK is turned back.
    """
    rank, at = tile_and_head(gl.cdiv(S, KEYS), n_groups, heads_per_wave)
    batch = at // G
    group = at % G
    first_key = rank * KEYS
    shift += at.to(gl.int64) * group_size * row_pitch
    delta += at.to(gl.int64) * group_size * row_pitch
    if HAS_MASK:
        key_mask += batch.to(gl.int64) * stride_mb
    begin, dense, dense_end, end = visible_query_tiles(
        first_key, T, S - T, window, QUERIES, KEYS, CAUSAL, HAS_WINDOW
    )

    k_smem = gl.allocate_shared_memory(k_desc.dtype, [1, 1, KEYS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [1, 1, KEYS, D], v_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, QUERIES, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(do_desc.dtype, [STAGES, 1, 1, QUERIES, D], do_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(do_full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    fence_async_shared()

    memory = (k_smem, v_smem, q_smem, do_smem)
    barriers = (kv_full, q_full, do_full, empty)
    tiles = (begin, dense, dense_end, end, group_size)
    n = (end - begin) * group_size
    place = (batch, group, group * group_size, first_key)
    tables = (k_cos, k_sin, stride_kcb)
    sizes = (T, S, window, row_pitch, scale, scale_log2, cap)
    FLAGS: gl.constexpr = (CAUSAL, HAS_MASK, HAS_WINDOW, HAS_CAP)
    gl.warp_specialize(
        [
            (_consume, (dk_desc, dv_desc, key_mask, tables, shift, delta, memory, barriers, tiles, n,
                        place, sizes, FLAGS, ROTARY, D, STAGES)),
            (_produce, (k_desc, v_desc, q_desc, do_desc, memory, barriers, tiles, n, place, STAGES)),
        ],
        [1],
        [24],
    )  # fmt: skip
