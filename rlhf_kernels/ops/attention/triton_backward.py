"""The backward kernels: dQ with a tile of queries per program, dK and dV with a tile of keys. No atomics.

With `shift` the log-sum-exp in base 2 and `delta` the row sums of out * grad_out, the weights are
exp2(scores - shift) and the gradient of the scores is weights * (grad_out v^T - delta). A row that sees no
key has shift +inf, hence weights 0. The dQ kernel runs first and leaves shift and delta for the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_kernels.ops.attention.triton_tiles import (
    dot,
    load,
    masked_tile,
    offsets,
    tile_and_head,
    visible_key_tiles,
    visible_query_tiles,
)  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _query_gradient(
    dq, q, do, shift, delta, k, v, key_mask, tile, queries, S, offset, stride_ks, stride_vs, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of keys contributes to dQ."""
    first = tl.cast(tile, tl.int64) * BLOCK_N
    k_tile = k + first * stride_ks + offsets(BLOCK_N, D, stride_ks)
    v_tile = v + first * stride_vs + offsets(BLOCK_N, D, stride_vs)
    if MASKED:
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = keys < S
        keep = inside
        if HAS_MASK:
            keep = tl.load(key_mask + keys, mask=inside, other=0) != 0
        keys_tile = load(k_tile, keep[:, None], UPCAST)  # ds 0 times NaN would be NaN
        values = load(v_tile, inside[:, None], UPCAST)
    else:
        keys_tile = load(k_tile, None, UPCAST)
        values = load(v_tile, None, UPCAST)
    weights = tl.exp2(dot(q, tl.trans(keys_tile)) * scale - shift[:, None])
    ds = weights * (dot(do, tl.trans(values)) - delta[:, None])
    if MASKED:
        seen = keep[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= queries[:, None] + offset)
        ds = tl.where(seen, ds, 0.0)
    return dot(ds.to(keys_tile.dtype), keys_tile, dq)


@triton.jit(do_not_specialize=["n_heads", "H", "group_size", "T", "S", "heads_per_wave"])
def query_gradient_kernel(
    q, k, v, key_mask, span, out, lse, grad_out, grad_lse, dq, shift, delta, scale, scale_log2,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_mb, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    stride_dqb, stride_dqh, stride_dqt, row_pitch, n_heads, H, group_size, T, S, heads_per_wave,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head, and that tile's shift and delta, pads included."""
    n_tiles = tl.cdiv(T, BLOCK_M)
    rank, head = tile_and_head(n_tiles, n_heads, heads_per_wave)
    first = (n_tiles - 1 - rank) * BLOCK_M
    batch = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    k += batch * stride_kb + h // group_size * stride_kg
    v += batch * stride_vb + h // group_size * stride_vg
    if HAS_MASK:
        key_mask += batch * stride_mb

    queries = first + tl.arange(0, BLOCK_M)
    inside = queries < T
    start = first.to(tl.int64)
    q += batch * stride_qb + h * stride_qh + start * stride_qt
    out += batch * stride_ob + h * stride_oh + start * stride_ot
    grad_out += batch * stride_gb + h * stride_gh + start * stride_gt
    do = load(grad_out + offsets(BLOCK_M, D, stride_gt), inside[:, None], UPCAST)
    o = load(out + offsets(BLOCK_M, D, stride_ot), inside[:, None], UPCAST)
    delta_tile = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    row = head.to(tl.int64) * T + queries
    if HAS_GRAD_LSE:
        delta_tile -= tl.load(grad_lse + row, mask=inside, other=0.0)
    lse_tile = tl.load(lse + row, mask=inside, other=float("-inf"))
    shift_tile = tl.where(lse_tile == float("-inf"), float("inf"), lse_tile * LOG2E)
    row = head.to(tl.int64) * row_pitch + queries
    tl.store(shift + row, shift_tile)
    tl.store(delta + row, delta_tile)
    q_tile = load(q + offsets(BLOCK_M, D, stride_qt), inside[:, None], UPCAST)

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    begin, dense, dense_end, end = visible_key_tiles(
        span, batch, first, S, S - T, BLOCK_M, BLOCK_N, CAUSAL, HAS_MASK
    )
    for tile in range(dense, dense_end):
        acc = _query_gradient(
            acc, q_tile, do, shift_tile, delta_tile, k, v, key_mask, tile, queries, S, S - T,
            stride_ks, stride_vs, scale_log2, BLOCK_N, D, False, CAUSAL, HAS_MASK, UPCAST,
        )  # fmt: skip
    for i in tl.range(0, end - begin - (dense_end - dense), num_stages=1 if HAS_MASK else None):
        tile = masked_tile(i, begin, dense, dense_end)
        acc = _query_gradient(
            acc, q_tile, do, shift_tile, delta_tile, k, v, key_mask, tile, queries, S, S - T,
            stride_ks, stride_vs, scale_log2, BLOCK_N, D, True, CAUSAL, HAS_MASK, UPCAST,
        )  # fmt: skip
    dq += batch * stride_dqb + h * stride_dqh + start * stride_dqt
    acc = (acc * scale).to(dq.dtype.element_ty)
    tl.store(dq + offsets(BLOCK_M, D, stride_dqt), acc, mask=inside[:, None])


@triton.jit
def _key_gradients(
    dk, dv, k, v, q, grad_out, shift, delta, tile, keys, T, offset, stride_qt, stride_gt, scale,
    BLOCK_M: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of queries contributes to dK and dV.

    Scores are held transposed, keys by queries: weights and ds are then laid out as the left operands that
    they become.
    """
    first = tl.cast(tile, tl.int64) * BLOCK_M
    lanes = first + tl.arange(0, BLOCK_M)
    inside = None
    if MASKED:
        inside = (lanes < T)[:, None]
    queries = load(q + first * stride_qt + offsets(BLOCK_M, D, stride_qt), inside, UPCAST)
    do = load(grad_out + first * stride_gt + offsets(BLOCK_M, D, stride_gt), inside, UPCAST)
    weights = tl.exp2(dot(k, tl.trans(queries)) * scale - tl.load(shift + lanes)[None, :])
    if MASKED and CAUSAL:
        weights = tl.where(keys[:, None] <= lanes[None, :] + offset, weights, 0.0)
    dv = dot(weights.to(do.dtype), do, dv)
    ds = weights * (dot(v, tl.trans(do)) - tl.load(delta + lanes)[None, :])
    dk = dot(ds.to(queries.dtype), queries, dk)
    return dk, dv


@triton.jit(do_not_specialize=["n_groups", "G", "group_size", "T", "S", "heads_per_wave"])
def key_gradient_kernel(
    q, k, v, key_mask, grad_out, shift, delta, dk, dv, scale, scale_log2,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_mb, stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkg, stride_dks,
    stride_dvb, stride_dvg, stride_dvs, row_pitch, n_groups, G, group_size, T, S, heads_per_wave,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one group, from every query head that reads it."""
    rank, batch_group = tile_and_head(tl.cdiv(S, BLOCK_N), n_groups, heads_per_wave)
    batch = (batch_group // G).to(tl.int64)
    group = (batch_group % G).to(tl.int64)
    keys = rank * BLOCK_N + tl.arange(0, BLOCK_N)
    start = rank.to(tl.int64) * BLOCK_N
    inside = keys < S
    keep = inside
    if HAS_MASK:
        keep = tl.load(key_mask + batch * stride_mb + keys, mask=inside, other=0) != 0
    k += batch * stride_kb + group * stride_kg + start * stride_ks
    v += batch * stride_vb + group * stride_vg + start * stride_vs
    k_tile = load(k + offsets(BLOCK_N, D, stride_ks), keep[:, None], UPCAST)
    v_tile = load(v + offsets(BLOCK_N, D, stride_vs), keep[:, None], UPCAST)
    q += batch * stride_qb + group * group_size * stride_qh
    grad_out += batch * stride_gb + group * group_size * stride_gh
    shift += batch_group.to(tl.int64) * group_size * row_pitch
    delta += batch_group.to(tl.int64) * group_size * row_pitch

    dk_acc = tl.zeros([BLOCK_N, D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, D], tl.float32)
    begin, dense, dense_end, end = visible_query_tiles(rank * BLOCK_N, T, S - T, BLOCK_M, BLOCK_N, CAUSAL)
    # One loop over the tiles of every query head, so that the pipeline fills once.
    n_dense = dense_end - dense
    for i in range(0, n_dense * group_size):
        h = tl.cast(i // n_dense, tl.int64)
        dk_acc, dv_acc = _key_gradients(
            dk_acc, dv_acc, k_tile, v_tile, q + h * stride_qh, grad_out + h * stride_gh,
            shift + h * row_pitch, delta + h * row_pitch, dense + i % n_dense, keys, T, S - T,
            stride_qt, stride_gt, scale_log2, BLOCK_M, D, False, CAUSAL, UPCAST,
        )  # fmt: skip
    n_masked = end - begin - n_dense
    for i in range(0, n_masked * group_size):
        h = tl.cast(i // n_masked, tl.int64)
        tile = masked_tile(i % n_masked, begin, dense, dense_end)
        dk_acc, dv_acc = _key_gradients(
            dk_acc, dv_acc, k_tile, v_tile, q + h * stride_qh, grad_out + h * stride_gh,
            shift + h * row_pitch, delta + h * row_pitch, tile, keys, T, S - T,
            stride_qt, stride_gt, scale_log2, BLOCK_M, D, True, CAUSAL, UPCAST,
        )  # fmt: skip

    # A masked key's row takes part in no other: it is cleared here rather than in the loop.
    dk_acc = tl.where(keep[:, None], dk_acc * scale, 0.0).to(dk.dtype.element_ty)
    dv_acc = tl.where(keep[:, None], dv_acc, 0.0).to(dv.dtype.element_ty)
    dk += batch * stride_dkb + group * stride_dkg + start * stride_dks
    dv += batch * stride_dvb + group * stride_dvg + start * stride_dvs
    tl.store(dk + offsets(BLOCK_N, D, stride_dks), dk_acc, mask=inside[:, None])
    tl.store(dv + offsets(BLOCK_N, D, stride_dvs), dv_acc, mask=inside[:, None])
