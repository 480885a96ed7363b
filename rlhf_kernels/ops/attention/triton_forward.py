"""The forward kernel (FlashAttention-2): one program holds a tile of queries and walks over the keys.

Its softmax is kept as a running maximum `top`, the `total` of the weights and the unscaled output `acc`.
Exponentials are of base 2.
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
)  # fmt: skip

LN2 = tl.constexpr(0.6931471805599453)
# The maximum of a row that has seen no key: finite, so that it can be subtracted from a masked score of -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _attend(
    acc, total, top, q, k, v, key_mask, tile, queries, S, offset, stride_ks, stride_vs, scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Takes one tile of keys into the running softmax."""
    first = tl.cast(tile, tl.int64) * BLOCK_N
    k_tile = k + first * stride_ks + offsets(BLOCK_N, D, stride_ks)
    v_tile = v + first * stride_vs + offsets(BLOCK_N, D, stride_vs)
    if MASKED:
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = keys < S
        keep = inside
        if HAS_MASK:
            keep = tl.load(key_mask + keys, mask=inside, other=0) != 0
        scores = dot(q, tl.trans(load(k_tile, inside[:, None], UPCAST)))
        seen = keep[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= queries[:, None] + offset)
        scores = tl.where(seen, scores, float("-inf"))
        values = load(v_tile, keep[:, None], UPCAST)  # weight 0 times NaN would be NaN
    else:
        scores = dot(q, tl.trans(load(k_tile, None, UPCAST)))
        values = load(v_tile, None, UPCAST)
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    acc = dot(weights.to(values.dtype), values, acc * shrink[:, None])
    return acc, total * shrink + tl.sum(weights, 1), higher


@triton.jit(do_not_specialize=["n_heads", "H", "group_size", "T", "S", "heads_per_wave"])
def forward_kernel(
    q, k, v, key_mask, span, out, lse, scale_log2,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_mb, stride_ob, stride_oh, stride_ot, n_heads, H, group_size, T, S, heads_per_wave,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries of one head."""
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
    q += batch * stride_qb + h * stride_qh + first.to(tl.int64) * stride_qt
    q_tile = load(q + offsets(BLOCK_M, D, stride_qt), inside[:, None], UPCAST)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)

    begin, dense, dense_end, end = visible_key_tiles(
        span, batch, first, S, S - T, BLOCK_M, BLOCK_N, CAUSAL, HAS_MASK
    )
    for tile in range(dense, dense_end):
        acc, total, top = _attend(
            acc, total, top, q_tile, k, v, key_mask, tile, queries, S, S - T,
            stride_ks, stride_vs, scale_log2, BLOCK_N, D, False, CAUSAL, HAS_MASK, UPCAST,
        )  # fmt: skip
    # With a key mask, loads that wait for other loads cost registers when they are pipelined.
    for i in tl.range(0, end - begin - (dense_end - dense), num_stages=1 if HAS_MASK else None):
        tile = masked_tile(i, begin, dense, dense_end)
        acc, total, top = _attend(
            acc, total, top, q_tile, k, v, key_mask, tile, queries, S, S - T,
            stride_ks, stride_vs, scale_log2, BLOCK_N, D, True, CAUSAL, HAS_MASK, UPCAST,
        )  # fmt: skip

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    out += batch * stride_ob + h * stride_oh + first.to(tl.int64) * stride_ot
    tl.store(out + offsets(BLOCK_M, D, stride_ot), acc.to(out.dtype.element_ty), mask=inside[:, None])
    lse += head.to(tl.int64) * T + queries
    tl.store(lse, tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2), mask=inside)
