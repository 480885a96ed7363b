"""token_advantages in Triton: gae's scan on rewards in registers alone, then masked_normalize's map.

A batch up to ONE_PROGRAM elements is one launch of one program. Of a larger one every program takes whole
rows and leaves their moments in a workspace, which the next launch merges: two launches, and three backward,
without a word to the host. Without whitening it is one launch either way. Tile and order of combination of a
row depend on T alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.advantage.kernel_triton import (
    NUM_WARPS,
    at,
    flag,
    next_values,
    plane,
    traced,
    traced_gradients,
    unsupported,
)
from rlhf_kernels.ops.advantage.kernel_triton import tile as gae_tile
from rlhf_kernels.ops.normalize import kernel_triton as normalize
from rlhf_kernels.ops.normalize.kernel_triton import (
    gradient_map,
    mapped_gradient,
    merged_moments,
    merged_sums,
    store_normalized,
    with_block,
)
from rlhf_kernels.runtime.launch import cdiv, launch
from rlhf_kernels.runtime.triton_lib import to_float32

__all__ = ["backward", "forward", "unsupported"]

ONE_PROGRAM = 4096
# Elements of a tile and its least steps: with less ptxas spares registers for sm_90 until it spills.
TILE, LEAST_STEPS = 1024, 64
SPAN = 1024  # elements that one program whitens at a time
CHUNKS = normalize.CHUNKS


@triton.jit
def _advantages_of_rows(
    row, score_ptr, kl_ptr, values_ptr, mask_ptr, raw_ptr, returns_ptr,
    score_stride, kl_stride, values_stride, mask_stride, n_rows, n_steps, kl_coef, gamma, decay,
    count, mean, squares, WHITEN: tl.constexpr, CARRY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advantages before whitening and, unless None, returns of some rows; the moments with theirs."""
    row = row.to(tl.int64)
    there = row < n_rows
    score = to_float32(tl.load(score_ptr + row * score_stride, mask=there, other=0.0))
    advantage = tl.zeros_like(score)
    following = tl.zeros_like(score)
    n_blocks = tl.cdiv(n_steps, BLOCK)
    for i in range(0, n_blocks):
        start = (n_blocks - 1 - i) * BLOCK
        t = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (t < n_steps)
        more = there[:, None] & (t + 1 < n_steps)
        real = flag(mask_ptr, row[:, None] * mask_stride + t, inside, True)
        real_next = flag(mask_ptr, row[:, None] * mask_stride + t + 1, more, True)
        kl = to_float32(tl.load(kl_ptr + row[:, None] * kl_stride + t, mask=real, other=0.0))
        values_at = values_ptr + row[:, None] * values_stride + t
        value = to_float32(tl.load(values_at, mask=real, other=0.0))
        follows = next_values(values_at + 1, real_next, more, following, CARRY)
        following = at(follows, t, start)
        # The score belongs to the last real step, which the blocks from the end meet first.
        last = tl.max(tl.where(real, t, -1), 1)
        reward = tl.where(t == last[:, None], score[:, None], 0.0) - kl_coef * kl
        score = tl.where(last >= 0, 0.0, score)
        live = real if CARRY else inside
        delta = tl.where(live, reward + gamma * follows - value, 0.0)
        scanned = traced(tl.where(live, decay, 1.0), delta, advantage)
        advantage = at(scanned, t, start)
        out = row[:, None] * n_steps + t
        tl.store(raw_ptr + out, tl.where(real, scanned, 0.0).to(raw_ptr.dtype.element_ty), mask=inside)
        if returns_ptr is not None:
            returned = tl.where(real, scanned + value, 0.0)
            tl.store(returns_ptr + out, returned.to(returns_ptr.dtype.element_ty), mask=inside)
        if WHITEN:
            size: tl.constexpr = scanned.shape[0] * BLOCK
            count, mean, squares = with_block(
                count, mean, squares, tl.reshape(scanned, (size,)), tl.reshape(real, (size,))
            )
    return count, mean, squares


@triton.jit
def token_forward_kernel(
    score_ptr, kl_ptr, values_ptr, mask_ptr, raw_ptr, returns_ptr, out_ptr, parts_ptr,
    score_stride, kl_stride, values_stride, mask_stride, n_rows, n_steps, per_program,
    kl_coef, gamma, decay, eps, flags,
    WHITEN: tl.constexpr, CARRY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """`per_program` rows. WHITEN: their moments go to `parts`, or, where that is None, all rows are here and
    whitened at once, from `raw` to `out`."""
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    squares = tl.full((), 0.0, tl.float64)
    begin = tl.program_id(0) * per_program
    for first in range(0, per_program, ROWS):
        count, mean, squares = _advantages_of_rows(
            begin + first + tl.arange(0, ROWS), score_ptr, kl_ptr, values_ptr, mask_ptr, raw_ptr, returns_ptr,
            score_stride, kl_stride, values_stride, mask_stride, n_rows, n_steps, kl_coef, gamma, decay,
            count, mean, squares, WHITEN, CARRY, BLOCK,
        )  # fmt: skip
    if WHITEN:
        if parts_ptr is not None:
            parts_ptr += 3 * tl.program_id(0)
            tl.store(parts_ptr, count)
            tl.store(parts_ptr + 1, mean)
            tl.store(parts_ptr + 2, squares)
        else:
            tl.debug_barrier()  # other threads read what these wrote
            # Divided in float32: a float64 division is a subroutine that spills around the call.
            store_normalized(
                raw_ptr, mask_ptr, out_ptr, n_rows * n_steps, count.to(tl.float32), mean,
                squares.to(tl.float32), eps, flags, True, SPAN,
            )  # fmt: skip


@triton.jit
def _gradients_of_rows(
    row, grad_ptr, grad_returns_ptr, mask_ptr, raw_ptr, grad_score_ptr, grad_kl_ptr, grad_values_ptr,
    grad_stride, grad_returns_stride, mask_stride, n_rows, n_steps, kl_coef, gamma, decay,
    mean, rstd, average, slope, flags, CARRY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gae's scan forwards; where there is `raw`, the gradient goes through the whitening on the way in."""
    row = row.to(tl.int64)
    there = row < n_rows
    before = tl.zeros_like(row).to(tl.float32)
    sent = tl.zeros_like(before)
    latest = tl.zeros_like(before)
    for start in range(0, n_steps, BLOCK):
        t = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (t < n_steps)
        earlier = inside & (t >= 1)
        real = flag(mask_ptr, row[:, None] * mask_stride + t, inside, True)
        real_before = flag(mask_ptr, row[:, None] * mask_stride + t - 1, earlier, True)
        grad = to_float32(tl.load(grad_ptr + row[:, None] * grad_stride + t, mask=real, other=0.0))
        returned_at = grad_returns_ptr + row[:, None] * grad_returns_stride + t
        returned = to_float32(tl.load(returned_at, mask=real, other=0.0))
        out = row[:, None] * n_steps + t
        if raw_ptr is not None:
            x = tl.load(raw_ptr + out, mask=real, other=0.0)
            grad = tl.where(real, mapped_gradient(grad, x, mean, rstd, average, slope, flags), 0.0)
        live_before = real_before if CARRY else earlier
        trace = tl.where(live_before, decay, tl.where(earlier, 1.0, 0.0))
        to_next = tl.where(live_before, gamma, 0.0)
        passes = tl.where(live_before, 0.0, 1.0)
        x, n = traced_gradients(trace, to_next, passes, grad + returned, before, sent)
        before = at(x, t, start + BLOCK - 1)
        sent = at(n, t, start + BLOCK - 1)
        last = tl.max(tl.where(real, t, -1), 1)
        latest = tl.where(last >= 0, at(x, t, last[:, None]), latest)
        element = grad_kl_ptr.dtype.element_ty
        tl.store(grad_kl_ptr + out, tl.where(real, -kl_coef * x, 0.0).to(element), mask=inside)
        tl.store(grad_values_ptr + out, tl.where(real, returned - x + n, 0.0).to(element), mask=inside)
    tl.store(grad_score_ptr + row, latest.to(grad_score_ptr.dtype.element_ty), mask=there)


@triton.jit
def _gradient_map(count, squares, total, along, eps, flags):
    """normalize's, divided in float32 as above."""
    return gradient_map(
        count.to(tl.float32), squares.to(tl.float32), total.to(tl.float32), along.to(tl.float32), eps, flags
    )


@triton.jit
def token_backward_kernel(
    grad_ptr, grad_returns_ptr, mask_ptr, raw_ptr, parts_ptr, sums_ptr,
    grad_score_ptr, grad_kl_ptr, grad_values_ptr,
    grad_stride, grad_returns_stride, mask_stride, n_rows, n_steps, chunks,
    kl_coef, gamma, decay, eps, flags,
    CARRY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """ROWS rows; where there is `raw`, with the moments and the sums of all chunks of the batch."""
    mean = 0.0
    rstd = 0.0
    average = 0.0
    slope = 0.0
    if raw_ptr is not None:
        count, mean, squares = merged_moments(parts_ptr, chunks, CHUNKS)
        total, along = merged_sums(sums_ptr, chunks, CHUNKS)
        rstd, average, slope = _gradient_map(count, squares, total, along, eps, flags)
    _gradients_of_rows(
        tl.program_id(0) * ROWS + tl.arange(0, ROWS), grad_ptr, grad_returns_ptr, mask_ptr,
        raw_ptr, grad_score_ptr, grad_kl_ptr, grad_values_ptr, grad_stride, grad_returns_stride, mask_stride,
        n_rows, n_steps, kl_coef, gamma, decay, mean, rstd, average, slope, flags, CARRY, BLOCK,
    )  # fmt: skip


def tile(steps: int) -> tuple[int, int]:
    """Rows and steps of a program's tile, by the number of steps alone."""
    return gae_tile(max(steps, LEAST_STEPS), TILE)


def _shares(rows: int, tile_rows: int) -> tuple[int, int]:
    """Rows of a program, and programs, at most CHUNKS of them."""
    each = tile_rows * cdiv(cdiv(rows, tile_rows), CHUNKS)
    return each, cdiv(rows, each)


def _raw_advantages(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], raw: Tensor, returns: Tensor | None, out: Tensor | None,
    parts: Tensor | None, each: int, numbers: tuple[float, ...], carry: bool, whiten: bool,
) -> None:  # fmt: skip
    """One launch; `numbers` are kl_coef, gamma, decay, eps and flags."""
    score, kl, values, mask = inputs
    rows, steps = values.shape
    tensors, strides = zip(*map(plane, (kl, values, mask)))
    tile_rows, block = tile(steps)
    launch(
        token_forward_kernel, (cdiv(rows, each),), values,
        score, *tensors, raw, returns, out, parts, score.stride(0), *strides, rows, steps, each, *numbers,
        WHITEN=whiten, CARRY=carry, ROWS=tile_rows, BLOCK=block, SPAN=SPAN, num_warps=NUM_WARPS,
    )  # fmt: skip


def forward(
    score: Tensor, kl: Tensor, values: Tensor, mask: Tensor,
    kl_coef: float, gamma: float, lam: float, carry: bool, normalized: bool, eps: float, flags: int,
    one_program: int = ONE_PROGRAM,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and returns; up to `one_program` elements in one launch."""
    rows, steps = values.shape
    out, returns = (torch.empty((rows, steps), dtype=values.dtype, device=values.device) for _ in range(2))
    if out.numel() == 0:
        return out, returns
    tile_rows, _ = tile(steps)
    numbers = (float(kl_coef), float(gamma), float(gamma * lam), eps, flags)
    inputs = (score, kl, values, mask.contiguous() if normalized else mask)  # the map takes it as one row
    if not normalized:
        _raw_advantages(inputs, out, returns, None, None, tile_rows, numbers, carry, False)
        return out, returns
    # 16-bit advantages are rounded once, after whitening.
    raw = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    if out.numel() <= one_program:
        each = tile_rows * cdiv(rows, tile_rows)
        _raw_advantages(inputs, raw, returns, out, None, each, numbers, carry, True)
        return out, returns
    each, chunks = _shares(rows, tile_rows)
    parts = torch.empty((chunks, 3), dtype=torch.float64, device=values.device)
    _raw_advantages(inputs, raw, returns, None, parts, each, numbers, carry, True)
    launch(
        normalize.forward_kernel, (1, chunks), values,
        raw, inputs[3].view(torch.uint8), parts, out, 0, 0, rows * steps, each * steps, eps, flags,
        MASKED=True, HIDE=True, SPLIT=True, BLOCK=normalize.BLOCK, CHUNKS=CHUNKS,
        num_warps=normalize.NUM_WARPS,
    )  # fmt: skip
    return out, returns


def backward(
    grad: Tensor, grad_returns: Tensor, score: Tensor, kl: Tensor, values: Tensor, mask: Tensor,
    kl_coef: float, gamma: float, lam: float, carry: bool, normalized: bool, eps: float, flags: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of score, kl and values; the advantages are made again where they were whitened."""
    rows, steps = values.shape
    like = {"dtype": values.dtype, "device": values.device}
    if values.numel() == 0:
        return torch.zeros((rows,), **like), values.new_empty((rows, steps)), values.new_empty((rows, steps))
    found = (torch.empty((rows,), **like), *(torch.empty((rows, steps), **like) for _ in range(2)))
    tile_rows, block = tile(steps)
    numbers = (float(kl_coef), float(gamma), float(gamma * lam), eps, flags)
    raw = parts = sums = None
    chunks = 0
    if normalized:
        grad, mask = grad.contiguous(), mask.contiguous()  # the sums take them as one row
        raw = torch.empty((rows, steps), dtype=torch.float32, device=values.device)
    tensors, strides = zip(*map(plane, (grad, grad_returns, kl, values, mask)))
    grad, grad_returns, kl, values, flags_of_mask = tensors
    if normalized:
        each, chunks = _shares(rows, tile_rows)
        parts, sums = (torch.empty((chunks, n), dtype=torch.float64, device=values.device) for n in (3, 2))
        _raw_advantages((score, kl, values, mask), raw, None, None, parts, each, numbers, carry, True)
        launch(
            normalize.sums_kernel, (1, chunks), values,
            grad, raw, flags_of_mask, parts, sums, 0, 0, rows * steps, each * steps, flags,
            MASKED=True, BLOCK=normalize.BLOCK, CHUNKS=CHUNKS, num_warps=normalize.NUM_WARPS,
        )  # fmt: skip
    launch(
        token_backward_kernel, (cdiv(rows, tile_rows),), values,
        grad, grad_returns, flags_of_mask, raw, parts, sums, *found, *strides[:2], strides[4],
        rows, steps, chunks, *numbers,
        CARRY=carry, ROWS=tile_rows, BLOCK=block, CHUNKS=CHUNKS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return found
