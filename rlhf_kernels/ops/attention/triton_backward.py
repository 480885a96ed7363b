"""The backward kernels: dQ with a tile of queries per program, dK and dV with a tile of keys. No atomics.

With `shift` the log-sum-exp in base 2 and `delta` the row sums of out * grad_out, the weights are
exp2(scores - shift) and the gradient of the scores is weights * (grad_out v^T - delta). A row that sees no
key has shift +inf, hence weights 0. The dQ kernel runs first and leaves shift and delta for the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlhf_kernels.ops.attention.triton_packed import packed_tile
from rlhf_kernels.ops.attention.triton_tiles import (
    dot,
    load_tile,
    load_turned,
    masked_tile,
    seen,
    store_tile,
    store_turned_back,
    tanh,
    tile_and_head,
    visible_key_tiles,
    visible_query_tiles,
)  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _bent(scores, scale, HAS_CAP: tl.constexpr):
    """What the cap is multiplied by, or the scores where there is none."""
    return tanh(scores * scale) if HAS_CAP else scores


@triton.jit
def _weights(bent, shift, scale, cap, HAS_CAP: tl.constexpr):
    """Of the softmax."""
    return tl.exp2(bent * (cap if HAS_CAP else scale) - shift)


@triton.jit
def _query_gradient(
    dq, q, do, shift, delta, k, v, key_mask, cos, sin, tile, queries, S, offset, window, stride_ks, stride_vs,
    scale, cap, BLOCK_N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    ROTARY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of keys contributes to dQ."""
    first = tl.cast(tile, tl.int64) * BLOCK_N
    if ROTARY:
        cos += first * (D // 2)
        sin += first * (D // 2)
    inside, keep = None, None
    if MASKED:
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = keys < S
        keep = inside
        if HAS_MASK:
            keep = tl.load(key_mask + keys, mask=inside, other=0) != 0
    # Of keys unseen by all 0, since ds 0 times NaN would be NaN.
    turned = load_turned(k + first * stride_ks, cos, sin, stride_ks, keep, BLOCK_N, D, WIDTH, ROTARY, UPCAST)
    values = load_tile(v + first * stride_vs, stride_vs, inside, BLOCK_N, D, WIDTH, UPCAST)
    bent = _bent(dot(q, tl.trans(turned)), scale, HAS_CAP)
    weights = _weights(bent, shift[:, None], scale, cap, HAS_CAP)
    ds = weights * (dot(do, tl.trans(values)) - delta[:, None])
    if HAS_CAP:
        ds *= 1.0 - bent * bent
    if MASKED:
        see = seen(keys[None, :], queries[:, None] + offset, window, keep[None, :], CAUSAL, HAS_WINDOW)
        ds = tl.where(see, ds, 0.0)
    return dot(ds.to(turned.dtype), turned, dq)


@triton.jit(do_not_specialize=["n_heads", "H", "group_size", "T", "S", "window", "heads_per_wave",
                               "lse_pitch", "n_sequences", "most_tiles"])  # fmt: skip
def query_gradient_kernel(
    q, k, v, key_mask, span, q_cos, q_sin, k_cos, k_sin, q_plan, k_plan, out, lse, grad_out, grad_lse, dq,
    shift, delta, scale, scale_log2, cap,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_mb, stride_qcb, stride_kcb, stride_ob, stride_oh, stride_ot, stride_gb, stride_gh, stride_gt,
    stride_dqb, stride_dqh, stride_dqt, row_pitch,
    n_heads, H, group_size, T, S, window, heads_per_wave, lse_pitch, n_sequences, most_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, ROTARY: tl.constexpr,
    PACKED: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries of one head, and that tile's shift and delta, pads included."""
    n_tiles = most_tiles if PACKED else tl.cdiv(T, BLOCK_M)
    rank, head = tile_and_head(n_tiles, n_heads, heads_per_wave)
    first_query, first_key, before = 0, 0, 0
    if PACKED:
        if rank >= tl.load(q_plan + 2 * n_sequences + 3):
            return
        _, before, first_query, T, first_key, S = packed_tile(q_plan, k_plan, n_sequences, rank)
        rank -= before
        n_tiles = tl.cdiv(T, BLOCK_M)
    first = (n_tiles - 1 - rank) * BLOCK_M
    start = first.to(tl.int64) + first_query
    row = head.to(tl.int64) * lse_pitch + first_query
    padded_row = head.to(tl.int64) * row_pitch + before * BLOCK_M
    batch = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    k += batch * stride_kb + h // group_size * stride_kg + first_key * stride_ks
    v += batch * stride_vb + h // group_size * stride_vg + first_key * stride_vs
    if HAS_MASK:
        key_mask += batch * stride_mb
    if ROTARY:
        q_cos += batch * stride_qcb + start * (D // 2)
        q_sin += batch * stride_qcb + start * (D // 2)
        k_cos += batch * stride_kcb + first_key * (D // 2)
        k_sin += batch * stride_kcb + first_key * (D // 2)

    queries = first + tl.arange(0, BLOCK_M)
    inside = queries < T
    q += batch * stride_qb + h * stride_qh + start * stride_qt
    out += batch * stride_ob + h * stride_oh + start * stride_ot
    grad_out += batch * stride_gb + h * stride_gh + start * stride_gt
    do = load_tile(grad_out, stride_gt, inside, BLOCK_M, D, WIDTH, UPCAST)
    o = load_tile(out, stride_ot, inside, BLOCK_M, D, WIDTH, UPCAST)
    delta_tile = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        delta_tile -= tl.load(grad_lse + row + queries, mask=inside, other=0.0)
    lse_tile = tl.load(lse + row + queries, mask=inside, other=float("-inf"))
    shift_tile = tl.where(lse_tile == float("-inf"), float("inf"), lse_tile * LOG2E)
    tl.store(shift + padded_row + queries, shift_tile)
    tl.store(delta + padded_row + queries, delta_tile)
    q_tile = load_turned(q, q_cos, q_sin, stride_qt, inside, BLOCK_M, D, WIDTH, ROTARY, UPCAST)

    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    begin, dense, dense_end, end = visible_key_tiles(
        span, batch, first, S, S - T, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_MASK, HAS_WINDOW
    )
    for tile in range(dense, dense_end):
        acc = _query_gradient(
            acc, q_tile, do, shift_tile, delta_tile, k, v, key_mask, k_cos, k_sin, tile, queries, S, S - T,
            window, stride_ks, stride_vs, scale_log2, cap,
            BLOCK_N, D, WIDTH, False, CAUSAL, HAS_MASK, HAS_WINDOW, HAS_CAP, ROTARY, UPCAST,
        )  # fmt: skip
    for i in tl.range(0, end - begin - (dense_end - dense), num_stages=1 if HAS_MASK or ROTARY else None):
        tile = masked_tile(i, begin, dense, dense_end)
        acc = _query_gradient(
            acc, q_tile, do, shift_tile, delta_tile, k, v, key_mask, k_cos, k_sin, tile, queries, S, S - T,
            window, stride_ks, stride_vs, scale_log2, cap,
            BLOCK_N, D, WIDTH, True, CAUSAL, HAS_MASK, HAS_WINDOW, HAS_CAP, ROTARY, UPCAST,
        )  # fmt: skip
    dq += batch * stride_dqb + h * stride_dqh + start * stride_dqt
    store_turned_back(dq, q_cos, q_sin, stride_dqt, inside, acc * scale, BLOCK_M, D, WIDTH, ROTARY)


@triton.jit
def _key_gradients(
    dk, dv, k, v, q, grad_out, shift, delta, cos, sin, tile, keys, T, offset, window, stride_qt, stride_gt,
    scale, cap, BLOCK_M: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, ROTARY: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds what one tile of queries contributes to dK and dV.

    Scores are held transposed, keys by queries: weights and ds are then laid out as the left operands that
    they become.
    """
    first = tl.cast(tile, tl.int64) * BLOCK_M
    if ROTARY:
        cos += first * (D // 2)
        sin += first * (D // 2)
    lanes = first + tl.arange(0, BLOCK_M)
    inside = None
    if MASKED:
        inside = lanes < T
    turned = load_turned(
        q + first * stride_qt, cos, sin, stride_qt, inside, BLOCK_M, D, WIDTH, ROTARY, UPCAST
    )
    do = load_tile(grad_out + first * stride_gt, stride_gt, inside, BLOCK_M, D, WIDTH, UPCAST)
    bent = _bent(dot(k, tl.trans(turned)), scale, HAS_CAP)
    weights = _weights(bent, tl.load(shift + lanes)[None, :], scale, cap, HAS_CAP)
    if MASKED and (CAUSAL or HAS_WINDOW):
        see = seen(keys[:, None], lanes[None, :] + offset, window, None, CAUSAL, HAS_WINDOW)
        weights = tl.where(see, weights, 0.0)
    dv = dot(weights.to(do.dtype), do, dv)
    ds = weights * (dot(v, tl.trans(do)) - tl.load(delta + lanes)[None, :])
    if HAS_CAP:
        ds *= 1.0 - bent * bent
    dk = dot(ds.to(turned.dtype), turned, dk)
    return dk, dv


@triton.jit(do_not_specialize=["n_groups", "G", "group_size", "T", "S", "window", "heads_per_wave",
                               "n_sequences", "most_tiles", "pad"])  # fmt: skip
def key_gradient_kernel(
    q, k, v, key_mask, q_cos, q_sin, k_cos, k_sin, q_plan, k_plan, grad_out, shift, delta, dk, dv,
    scale, scale_log2, cap,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_mb, stride_qcb, stride_kcb, stride_gb, stride_gh, stride_gt, stride_dkb, stride_dkg, stride_dks,
    stride_dvb, stride_dvg, stride_dvs, row_pitch,
    n_groups, G, group_size, T, S, window, heads_per_wave, n_sequences, most_tiles, pad,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, ROTARY: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys of one group, from every query head that reads it.

    Packed, the rows of shift and delta are padded to `pad` for each sequence.
    """
    rank, batch_group = tile_and_head(most_tiles if PACKED else tl.cdiv(S, BLOCK_N), n_groups, heads_per_wave)
    padded_row = batch_group.to(tl.int64) * group_size * row_pitch
    first_query, first_key = 0, 0
    if PACKED:
        if rank >= tl.load(k_plan + 2 * n_sequences + 3):
            return
        sequence, before, first_key, S, first_query, T = packed_tile(k_plan, q_plan, n_sequences, rank)
        rank -= before
        padded_row += tl.load(q_plan + n_sequences + 2 + sequence) * pad
    batch = (batch_group // G).to(tl.int64)
    group = (batch_group % G).to(tl.int64)
    keys = rank * BLOCK_N + tl.arange(0, BLOCK_N)
    start = rank.to(tl.int64) * BLOCK_N + first_key
    inside = keys < S
    keep = inside
    if HAS_MASK:
        keep = tl.load(key_mask + batch * stride_mb + keys, mask=inside, other=0) != 0
    if ROTARY:
        q_cos += batch * stride_qcb + first_query * (D // 2)
        q_sin += batch * stride_qcb + first_query * (D // 2)
        k_cos += batch * stride_kcb + start * (D // 2)
        k_sin += batch * stride_kcb + start * (D // 2)
    k += batch * stride_kb + group * stride_kg + start * stride_ks
    v += batch * stride_vb + group * stride_vg + start * stride_vs
    k_tile = load_turned(k, k_cos, k_sin, stride_ks, keep, BLOCK_N, D, WIDTH, ROTARY, UPCAST)
    v_tile = load_tile(v, stride_vs, keep, BLOCK_N, D, WIDTH, UPCAST)
    q += batch * stride_qb + group * group_size * stride_qh + first_query * stride_qt
    grad_out += batch * stride_gb + group * group_size * stride_gh + first_query * stride_gt
    shift += padded_row
    delta += padded_row

    dk_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    begin, dense, dense_end, end = visible_query_tiles(
        rank * BLOCK_N, T, S - T, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_WINDOW
    )
    # One loop over the tiles of every query head, so that the pipeline fills once.
    n_dense = dense_end - dense
    for i in range(0, n_dense * group_size):
        h = tl.cast(i // n_dense, tl.int64)
        dk_acc, dv_acc = _key_gradients(
            dk_acc, dv_acc, k_tile, v_tile, q + h * stride_qh, grad_out + h * stride_gh,
            shift + h * row_pitch, delta + h * row_pitch, q_cos, q_sin, dense + i % n_dense, keys, T, S - T,
            window, stride_qt, stride_gt, scale_log2, cap,
            BLOCK_M, D, WIDTH, False, CAUSAL, HAS_WINDOW, HAS_CAP, ROTARY, UPCAST,
        )  # fmt: skip
    n_masked = end - begin - n_dense
    for i in range(0, n_masked * group_size):
        h = tl.cast(i // n_masked, tl.int64)
        tile = masked_tile(i % n_masked, begin, dense, dense_end)
        dk_acc, dv_acc = _key_gradients(
            dk_acc, dv_acc, k_tile, v_tile, q + h * stride_qh, grad_out + h * stride_gh,
            shift + h * row_pitch, delta + h * row_pitch, q_cos, q_sin, tile, keys, T, S - T,
            window, stride_qt, stride_gt, scale_log2, cap,
            BLOCK_M, D, WIDTH, True, CAUSAL, HAS_WINDOW, HAS_CAP, ROTARY, UPCAST,
        )  # fmt: skip

    # A masked key's row takes part in no other: it is cleared here rather than in the loop.
    dk_acc = tl.where(keep[:, None], dk_acc * scale, 0.0)
    dv_acc = tl.where(keep[:, None], dv_acc, 0.0)
    dk += batch * stride_dkb + group * stride_dkg + start * stride_dks
    dv += batch * stride_dvb + group * stride_dvg + start * stride_dvs
    store_turned_back(dk, k_cos, k_sin, stride_dks, inside, dk_acc, BLOCK_N, D, WIDTH, ROTARY)
    store_tile(dv, stride_dvs, inside, dv_acc, BLOCK_N, D, WIDTH)
