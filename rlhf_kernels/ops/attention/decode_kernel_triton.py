"""decode_attention in Triton: programs share the keys of a row by its length alone, a second kernel adds up.

The query heads of one key head are one tile, padded to the 16 rows that a matrix instruction takes at least.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.attention.kernel_triton import LOG2E, refusal
from rlhf_kernels.ops.attention.triton_config import target_of
from rlhf_kernels.ops.attention.triton_forward import LOWEST
from rlhf_kernels.ops.attention.triton_tiles import dot, load
from rlhf_kernels.runtime.launch import INTERPRETED, cdiv, launch

HEAD_SIZES = (32, 64, 128)
MOST_SPLITS = 64  # of one row
MOST_HEADS = 64  # of one tile; 16 in float32, whose products no matrix instruction takes
COMBINE_WARPS = 4


def unsupported(device: str, dtype: torch.dtype, head_size: int | None) -> str | None:
    """Why these kernels cannot serve, or None."""
    return refusal(dtype, head_size, HEAD_SIZES)


@triton.jit
def _seen(lengths, starts, batch, C, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr):
    """The first slot that a row of the batch sees, and how many it sees."""
    low, high = 0, C
    if HAS_STARTS:
        low = tl.minimum(tl.maximum(tl.load(starts + batch), 0), C).to(tl.int32)
    if HAS_LENGTHS:
        high = tl.minimum(tl.maximum(tl.load(lengths + batch), 0), C).to(tl.int32)
    return low, tl.maximum(high - low, 0)


@triton.jit
def _share(count, LEAST: tl.constexpr, MOST: tl.constexpr):
    """Keys of one split: a multiple of LEAST, so that there are MOST splits at most."""
    return tl.maximum(tl.cdiv(tl.cdiv(count, MOST), LEAST), 1) * LEAST


@triton.jit(do_not_specialize=["H", "G", "C", "splits"])
def split_kernel(
    q, k, v, lengths, starts, values, tops, totals, scale_log2,
    stride_qb, stride_qh, stride_kb, stride_kg, stride_ks, stride_vb, stride_vg, stride_vs,
    H, G, C, splits, head_tiles,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of one row for a tile of the heads of one key head: values [D], maximum and total of each.

    Splits beyond the row's last are not written.
    """
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits % head_tiles
    row = program // (splits * head_tiles)
    batch = (row // G).to(tl.int64)
    group = (row % G).to(tl.int64)
    low, count = _seen(lengths, starts, batch, C, HAS_LENGTHS, HAS_STARTS)
    share = _share(count, LEAST, MOST)
    first = split * share
    if (first < count) | (split == 0):
        each = H // G
        member = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        head = group * each + member
        d = tl.arange(0, D)
        queries = load(
            q + batch * stride_qb + head[:, None] * stride_qh + d[None, :], (member < each)[:, None], UPCAST
        )
        slot = (low + first + tl.arange(0, BLOCK_N)).to(tl.int64)
        keys = k + batch * stride_kb + group * stride_kg + slot[:, None] * stride_ks + d[None, :]
        others = v + batch * stride_vb + group * stride_vg + slot[:, None] * stride_vs + d[None, :]
        acc = tl.zeros([BLOCK_H, D], tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        top = tl.full([BLOCK_H], LOWEST, tl.float32)
        left = tl.minimum(count - first, share)
        for _ in range(0, tl.cdiv(left, BLOCK_N)):
            inside = tl.arange(0, BLOCK_N) < left
            scores = dot(queries, tl.trans(load(keys, inside[:, None], UPCAST))) * scale_log2
            scores = tl.where(inside[None, :], scores, float("-inf"))
            seen = load(others, inside[:, None], UPCAST)
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            acc = dot(weights.to(seen.dtype), seen, acc * shrink[:, None])
            total = total * shrink + tl.sum(weights, 1)
            top = higher
            keys += BLOCK_N * stride_ks
            others += BLOCK_N * stride_vs
            left -= BLOCK_N
        at = (batch * H + head) * splits + split
        tl.store(values + at[:, None] * D + d[None, :], acc, mask=(member < each)[:, None])
        tl.store(tops + at, top, mask=member < each)
        tl.store(totals + at, total, mask=member < each)


@triton.jit(do_not_specialize=["H", "C", "splits"])
def combine_kernel(
    values, tops, totals, lengths, starts, out, H, C, splits,
    D: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """One head's splits, always MOST of them in one order, as its output."""
    program = tl.program_id(0).to(tl.int64)
    _, count = _seen(lengths, starts, program // H, C, HAS_LENGTHS, HAS_STARTS)
    used = tl.maximum(tl.cdiv(count, _share(count, LEAST, MOST)), 1)
    split = tl.arange(0, MOST)
    d = tl.arange(0, D)
    at = program * splits + split
    top = tl.load(tops + at, mask=split < used, other=LOWEST)
    weight = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weight * tl.load(totals + at, mask=split < used, other=0.0), 0)
    part = tl.load(values + at[:, None] * D + d[None, :], mask=(split < used)[:, None], other=0.0)
    # A split that is not there weighs 0 and holds 0.
    result = tl.sum(part * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + program * D + d, result.to(out.dtype.element_ty))


def least_keys(target: str) -> int:
    """Keys that are worth a program; few in the interpreter, so that small inputs have several."""
    return 32 if target == "interpreter" else 256


def tile(target: str, dtype: torch.dtype, size: int, each: int) -> tuple[int, int, int, int]:
    """Heads and keys of a tile, warps and stages."""
    most = 16 if dtype == torch.float32 else MOST_HEADS
    heads = min(max(16, triton.next_power_of_2(each)), most)
    if target == "interpreter":
        return heads, 16, 4, 1
    keys = 32 if dtype == torch.float32 or target == "gfx942" else 64
    return heads, keys, 4, 1 if target == "gfx942" else 2 if dtype == torch.float32 or size == 128 else 3


def forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, starts: Tensor | None, scale: float
) -> Tensor:
    """The output, [B, H, 1, D]."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k_cache, v_cache))
    lengths, starts = (None if x is None else x.contiguous() for x in (lengths, starts))
    (batch, heads, _, size), (groups, slots) = q.shape, k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    target = target_of(q.device)
    least = least_keys(target)
    block_h, block_n, warps, stages = tile(target, q.dtype, size, heads // groups)
    splits = max(1, min(MOST_SPLITS, cdiv(slots, least)))
    head_tiles = cdiv(heads // groups, block_h)
    values = q.new_empty(batch * heads * splits, size, dtype=torch.float32)
    tops, totals = q.new_empty(2, batch * heads * splits, dtype=torch.float32)
    flags = {
        "D": size,
        "LEAST": least,
        "MOST": MOST_SPLITS,
        "HAS_LENGTHS": lengths is not None,
        "HAS_STARTS": starts is not None,
    }
    launch(
        split_kernel, (batch * groups * head_tiles * splits,), q,
        q, k, v, lengths, starts, values, tops, totals, scale * LOG2E,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], heads, groups, slots, splits, head_tiles,
        BLOCK_H=block_h, BLOCK_N=block_n, UPCAST=INTERPRETED and q.dtype == torch.bfloat16, **flags,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    launch(
        combine_kernel, (batch * heads,), q,
        values, tops, totals, lengths, starts, out, heads, slots, splits, **flags, num_warps=COMBINE_WARPS,
    )  # fmt: skip
    return out
