"""The forward kernel (FlashAttention-2): one program holds a tile of queries and walks over the keys.

Its softmax is kept as a running maximum `top`, the `total` of the weights and the unscaled output `acc`.
Exponentials are of base 2. Under a cap c, scores are c tanh(scale q k / c): `scale` is then what the tanh
takes, and `cap` is c in base 2.
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
    tanh,
    tile_and_head,
    visible_key_tiles,
)  # fmt: skip

LN2 = tl.constexpr(0.6931471805599453)
# The maximum of a row that has seen no key: finite, so that it can be subtracted from a masked score of -inf.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _attend(
    acc, total, top, q, k, v, key_mask, cos, sin, tile, queries, S, offset, window, stride_ks, stride_vs,
    scale, cap, BLOCK_N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    ROTARY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Takes one tile of keys into the running softmax."""
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
    turned = load_turned(
        k + first * stride_ks, cos, sin, stride_ks, inside, BLOCK_N, D, WIDTH, ROTARY, UPCAST
    )
    scores = dot(q, tl.trans(turned))
    if HAS_CAP:
        scores = tanh(scores * scale) * cap
    if MASKED:
        see = seen(keys[None, :], queries[:, None] + offset, window, keep[None, :], CAUSAL, HAS_WINDOW)
        scores = tl.where(see, scores, float("-inf"))
    # Of keys unseen by all 0, since weight 0 times NaN would be NaN.
    values = load_tile(v + first * stride_vs, stride_vs, keep, BLOCK_N, D, WIDTH, UPCAST)
    if HAS_CAP:
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
    else:
        higher = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    acc = dot(weights.to(values.dtype), values, acc * shrink[:, None])
    return acc, total * shrink + tl.sum(weights, 1), higher


@triton.jit(do_not_specialize=["n_heads", "H", "group_size", "T", "S", "window", "heads_per_wave",
                               "lse_pitch", "n_sequences", "most_tiles"])  # fmt: skip
def forward_kernel(
    q, k, v, key_mask, span, q_cos, q_sin, k_cos, k_sin, q_plan, k_plan, out, lse, scale_log2, cap,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    stride_mb, stride_qcb, stride_kcb, stride_ob, stride_oh, stride_ot,
    n_heads, H, group_size, T, S, window, heads_per_wave, lse_pitch, n_sequences, most_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    ROTARY: tl.constexpr, PACKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of queries of one head."""
    n_tiles = most_tiles if PACKED else tl.cdiv(T, BLOCK_M)
    rank, head = tile_and_head(n_tiles, n_heads, heads_per_wave)
    first_query, first_key = 0, 0
    if PACKED:
        if rank >= tl.load(q_plan + 2 * n_sequences + 3):
            return
        _, before, first_query, T, first_key, S = packed_tile(q_plan, k_plan, n_sequences, rank)
        rank -= before
        n_tiles = tl.cdiv(T, BLOCK_M)
    first = (n_tiles - 1 - rank) * BLOCK_M
    start = first.to(tl.int64) + first_query
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
    q_tile = load_turned(q, q_cos, q_sin, stride_qt, inside, BLOCK_M, D, WIDTH, ROTARY, UPCAST)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)

    begin, dense, dense_end, end = visible_key_tiles(
        span, batch, first, S, S - T, window, BLOCK_M, BLOCK_N, CAUSAL, HAS_MASK, HAS_WINDOW
    )
    for tile in range(dense, dense_end):
        acc, total, top = _attend(
            acc, total, top, q_tile, k, v, key_mask, k_cos, k_sin, tile, queries, S, S - T, window,
            stride_ks, stride_vs, scale_log2, cap,
            BLOCK_N, D, WIDTH, False, CAUSAL, HAS_MASK, HAS_WINDOW, HAS_CAP, ROTARY, UPCAST,
        )  # fmt: skip
    # Loads that wait for others, as with a key mask, and turning cost registers when they are pipelined.
    for i in tl.range(0, end - begin - (dense_end - dense), num_stages=1 if HAS_MASK or ROTARY else None):
        tile = masked_tile(i, begin, dense, dense_end)
        acc, total, top = _attend(
            acc, total, top, q_tile, k, v, key_mask, k_cos, k_sin, tile, queries, S, S - T, window,
            stride_ks, stride_vs, scale_log2, cap,
            BLOCK_N, D, WIDTH, True, CAUSAL, HAS_MASK, HAS_WINDOW, HAS_CAP, ROTARY, UPCAST,
        )  # fmt: skip

    empty = total == 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    out += batch * stride_ob + h * stride_oh + start * stride_ot
    store_tile(out, stride_ot, inside, acc, BLOCK_M, D, WIDTH)
    logs = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    lse += head.to(tl.int64) * lse_pitch + first_query
    tl.store(lse + queries, logs, mask=inside)
