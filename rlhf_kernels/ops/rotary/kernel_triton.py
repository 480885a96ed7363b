"""rotary in Triton: each program turns a block of positions of one head, where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.runtime.launch import cdiv, launch
from rlhf_kernels.runtime.triton_lib import to_float32

PAIRS = 2048  # of one program
NUM_WARPS = 4


@triton.jit
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr,
    size1, size2, stride0, stride1, stride2, stride_t, steps, half, heads_per_table,
    INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [heads, steps, 2 half]; the heads of x are three dimensions, head = (i0 size1 + i1) size2 + i2."""
    blocks = tl.cdiv(steps, BLOCK_T)
    program = tl.program_id(0).to(tl.int64)
    head = program // blocks
    t = (program % blocks) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    start = head // (size1 * size2) * stride0 + head // size2 % size1 * stride1 + head % size2 * stride2

    pairs = tl.arange(0, BLOCK)[None, :]
    inside = (t < steps) & (pairs < half)
    table = (head // heads_per_table * steps + t) * half + pairs
    cos = tl.load(cos_ptr + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + table, mask=inside, other=0.0)
    if CONJUGATE:
        sin = -sin

    x = x_ptr + start + t * stride_t
    out = out_ptr + (head * steps + t) * (2 * half)
    element = out_ptr.dtype.element_ty
    if INTERLEAVED:
        # Neighbours are loaded in one piece and taken apart in registers.
        wide = tl.arange(0, 2 * BLOCK)[None, :]
        whole = (t < steps) & (wide < 2 * half)
        both = to_float32(tl.load(x + wide, mask=whole, other=0.0))
        a, b = tl.split(tl.reshape(both, (BLOCK_T, BLOCK, 2)))
        turned = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (BLOCK_T, 2 * BLOCK))
        tl.store(out + wide, turned.to(element), mask=whole)
    else:
        a = to_float32(tl.load(x + pairs, mask=inside, other=0.0))
        b = to_float32(tl.load(x + half + pairs, mask=inside, other=0.0))
        tl.store(out + pairs, (a * cos - b * sin).to(element), mask=inside)
        tl.store(out + half + pairs, (b * cos + a * sin).to(element), mask=inside)


def _heads(x: Tensor) -> list[tuple[int, int]]:
    """Size and stride of the dimensions before the last two, with those that lie flush taken together."""
    found: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-2], x.stride()[:-2]):
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        elif size != 1:
            found.append((size, stride))
    return found


def blocks(steps: int, half: int) -> tuple[int, int]:
    """Positions and pairs of one program's tile."""
    block = triton.next_power_of_2(half)
    return max(1, min(PAIRS // block, triton.next_power_of_2(steps))), block


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, conjugate: bool) -> Tensor:
    """Every pair of x turned by its position's angle; back by it where `conjugate`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if x.stride(-1) != 1 or len(_heads(x)) > 3:
        x = x.contiguous()
    (_, stride0), (size1, stride1), (size2, stride2) = [(1, 0)] * (3 - len(_heads(x))) + _heads(x)
    *_, steps, width = x.shape
    half = width // 2
    heads = x.numel() // (steps * width)
    block_t, block = blocks(steps, half)
    launch(
        rotary_kernel, (heads * cdiv(steps, block_t),), x,
        x, cos.contiguous(), sin.contiguous(), out,
        size1, size2, stride0, stride1, stride2, x.stride(-2), steps, half,
        heads if cos.dim() == 2 else heads // x.shape[0],
        INTERLEAVED=interleaved, CONJUGATE=conjugate, BLOCK_T=block_t, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out
