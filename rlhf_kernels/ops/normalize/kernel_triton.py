"""masked_normalize in Triton: moments, then the affine map; nothing atomic, no host synchronisation.

A row up to LONG elements is one program's. A longer one, the whole tensor say, is cut into at most CHUNKS
chunks whose moments go through a workspace; every program merges them again, all in the same order.
Moments are kept in float64 between blocks, so that a large offset does not cancel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.normalize.arguments import ZERO_MASKED
from rlhf_kernels.runtime.launch import cdiv, launch
from rlhf_kernels.runtime.launch import number as argument
from rlhf_kernels.runtime.triton_lib import number, to_float32

BLOCK = 4096
NUM_WARPS = 8
LONG = 16384
CHUNKS = 1024


@triton.jit
def _real(mask_ptr, cols, inside, MASKED: tl.constexpr):
    if MASKED:
        return inside & (tl.load(mask_ptr + cols, mask=inside, other=0) != 0)
    return inside


@triton.jit
def with_block(count, mean, squares, x, real):
    """The moments so far (float64) with the real elements of a block, [N], by Chan's formula."""
    # Divided in x's own arithmetic: a float64 division is a subroutine that spills around the call.
    n = tl.sum(real.to(tl.int32), 0).to(x.dtype)
    most = tl.maximum(n, 1.0)
    about = tl.sum(tl.where(real, x, 0.0), 0) / most
    d = tl.where(real, x - about, 0.0)
    rest = (tl.sum(d, 0) / most).to(tl.float64)  # what the rounded mean left over
    share = (n / tl.maximum(count.to(x.dtype) + n, 1.0)).to(tl.float64)
    delta = about.to(tl.float64) + rest - mean
    n = n.to(tl.float64)
    squares += tl.sum(d * d, 0).to(tl.float64) - rest * rest * n + delta * delta * count * share
    return count + n, mean + delta * share, squares


@triton.jit
def _moments(x_ptr, mask_ptr, size, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Count, mean and sum of squared deviations of `size` elements."""
    count = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    squares = tl.full((), 0.0, tl.float64)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < size
        real = _real(mask_ptr, cols, inside, MASKED)
        x = to_float32(tl.load(x_ptr + cols, mask=inside, other=0.0))
        count, mean, squares = with_block(count, mean, squares, x, real)
    return count, mean, squares


@triton.jit
def merged_moments(parts_ptr, chunks, CHUNKS: tl.constexpr):
    """The moments of a row from those of its chunks."""
    part = tl.arange(0, CHUNKS)
    there = part < chunks
    counts = tl.load(parts_ptr + 3 * part, mask=there, other=0.0)
    means = tl.load(parts_ptr + 3 * part + 1, mask=there, other=0.0)
    squares = tl.load(parts_ptr + 3 * part + 2, mask=there, other=0.0)
    count = tl.sum(counts, 0)
    mean = tl.sum(counts * means, 0) / tl.maximum(count, 1.0)
    d = means - mean
    return count, mean, tl.sum(squares + counts * d * d, 0)


@triton.jit
def merged_sums(sums_ptr, chunks, CHUNKS: tl.constexpr):
    """The gradient sums of a row from those of its chunks."""
    part = tl.arange(0, CHUNKS)
    sums_ptr += 2 * part
    total = tl.sum(tl.load(sums_ptr, mask=part < chunks, other=0.0), 0)
    return total, tl.sum(tl.load(sums_ptr + 1, mask=part < chunks, other=0.0), 0)


@triton.jit
def _variance(count, squares, eps, flags):
    """Degrees of freedom, 1 / std, and whether the variance lies below the clamp."""
    freedom = tl.maximum(count - tl.where((flags & 2) != 0, 1.0, 0.0), 1.0)
    var = squares / freedom
    add = (flags & 1) != 0
    clamped = (var < eps) & (not add)
    return freedom, 1.0 / tl.sqrt(tl.where(clamped, 0.0, var) + tl.where(clamped | add, eps, 0.0)), clamped


@triton.jit
def _center(x, mean):
    """x - mean, with the digits of the mean that x's type cannot hold."""
    high = mean.to(x.dtype)
    return (x - high) - (mean - high.to(tl.float64)).to(x.dtype)


@triton.jit
def store_normalized(
    x_ptr, mask_ptr, out_ptr, size, count, mean, squares, eps, flags,
    HIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) / std over `size` elements; out may be x."""
    _, rstd, _ = _variance(count, squares, number(eps, x_ptr), flags)
    offset = tl.where((flags & 4) != 0, 0.0, mean)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < size
        x = to_float32(tl.load(x_ptr + cols, mask=inside, other=0.0))
        out = _center(x, mean) * rstd.to(x.dtype) + offset.to(x.dtype)
        out = tl.where(_real(mask_ptr, cols, inside, HIDE), out, 0.0)
        tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_map(count, squares, total, along, eps, flags):
    """1 / std, average and slope: a gradient becomes (grad - average) / std + slope * (x - mean), and the
    average again where the mean stays."""
    freedom, rstd, clamped = _variance(count, squares, eps, flags)
    average = total / tl.maximum(count, 1.0)  # taken away before the scale, so that it cancels
    return rstd, average, tl.where(clamped, 0.0, -rstd * rstd * rstd * along / freedom)


@triton.jit
def mapped_gradient(grad, x, mean, rstd, average, slope, flags):
    """The gradient of a real element."""
    direct = tl.where((flags & 4) != 0, 0.0, average)
    through = direct.to(x.dtype) + slope.to(x.dtype) * _center(x, mean)
    return (grad - average.to(x.dtype)) * rstd.to(x.dtype) + through


@triton.jit
def gradient_sums(
    grad_ptr, x_ptr, mask_ptr, size, mean, flags, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of the gradient, and of the gradient times x - mean, over the slots that depend on the moments."""
    element = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((BLOCK,), element)
    along = tl.zeros((BLOCK,), element)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < size
        x = to_float32(tl.load(x_ptr + cols, mask=inside, other=0.0))
        grad = to_float32(tl.load(grad_ptr + cols, mask=inside, other=0.0))
        # A masked slot that is not finite has no say in the gradients of the others.
        counts = _real(mask_ptr, cols, inside, MASKED) | (inside & (x - x == 0.0) & ((flags & 8) == 0))
        total += tl.where(counts, grad, 0.0)
        along += tl.where(counts, grad * _center(x, mean), 0.0)
    return tl.sum(total, 0).to(tl.float64), tl.sum(along, 0).to(tl.float64)


@triton.jit
def moments_kernel(
    x_ptr, mask_ptr, parts_ptr, x_stride, mask_stride, length, chunk,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The moments of one chunk of one row."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * chunk
    size = tl.minimum(length - begin, chunk).to(tl.int32)
    x_ptr += row * x_stride + begin
    mask_ptr += row * mask_stride + begin
    count, mean, squares = _moments(x_ptr, mask_ptr, size, MASKED, BLOCK)
    parts_ptr += 3 * (row * tl.num_programs(1) + tl.program_id(1))
    tl.store(parts_ptr, count)
    tl.store(parts_ptr + 1, mean)
    tl.store(parts_ptr + 2, squares)


@triton.jit
def forward_kernel(
    x_ptr, mask_ptr, parts_ptr, out_ptr, x_stride, mask_stride, length, chunk, eps, flags,
    MASKED: tl.constexpr, HIDE: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) / std over one chunk, which is a whole row and gives its moments unless SPLIT."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * chunk
    size = tl.minimum(length - begin, chunk).to(tl.int32)
    x_ptr += row * x_stride + begin
    mask_ptr += row * mask_stride + begin
    out_ptr += row * length + begin
    if SPLIT:
        chunks = tl.num_programs(1)
        count, mean, squares = merged_moments(parts_ptr + 3 * row * chunks, chunks, CHUNKS)
    else:
        count, mean, squares = _moments(x_ptr, mask_ptr, size, MASKED, BLOCK)
    store_normalized(x_ptr, mask_ptr, out_ptr, size, count, mean, squares, eps, flags, HIDE, BLOCK)


@triton.jit
def sums_kernel(
    grad_ptr, x_ptr, mask_ptr, parts_ptr, sums_ptr, x_stride, mask_stride, length, chunk, flags,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The gradient sums of one chunk of one row."""
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.num_programs(1)
    begin = tl.program_id(1).to(tl.int64) * chunk
    size = tl.minimum(length - begin, chunk).to(tl.int32)
    _, mean, _ = merged_moments(parts_ptr + 3 * row * chunks, chunks, CHUNKS)
    grad_ptr += row * length + begin
    x_ptr += row * x_stride + begin
    mask_ptr += row * mask_stride + begin
    total, along = gradient_sums(grad_ptr, x_ptr, mask_ptr, size, mean, flags, MASKED, BLOCK)
    sums_ptr += 2 * (row * chunks + tl.program_id(1))
    tl.store(sums_ptr, total)
    tl.store(sums_ptr + 1, along)


@triton.jit
def backward_kernel(
    grad_ptr, x_ptr, mask_ptr, parts_ptr, sums_ptr, out_ptr,
    x_stride, mask_stride, length, chunk, eps, flags,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Gradient of x over one chunk: directly, and at real slots through the mean and the variance."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1).to(tl.int64) * chunk
    size = tl.minimum(length - begin, chunk).to(tl.int32)
    grad_ptr += row * length + begin
    x_ptr += row * x_stride + begin
    mask_ptr += row * mask_stride + begin
    out_ptr += row * length + begin
    if SPLIT:
        chunks = tl.num_programs(1)
        count, mean, squares = merged_moments(parts_ptr + 3 * row * chunks, chunks, CHUNKS)
        total, along = merged_sums(sums_ptr + 2 * row * chunks, chunks, CHUNKS)
    else:
        count, mean, squares = _moments(x_ptr, mask_ptr, size, MASKED, BLOCK)
        total, along = gradient_sums(grad_ptr, x_ptr, mask_ptr, size, mean, flags, MASKED, BLOCK)
    rstd, average, slope = gradient_map(count, squares, total, along, number(eps, x_ptr), flags)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < size
        x = to_float32(tl.load(x_ptr + cols, mask=inside, other=0.0))
        grad = to_float32(tl.load(grad_ptr + cols, mask=inside, other=0.0))
        real_grad = mapped_gradient(grad, x, mean, rstd, average, slope, flags)
        masked_grad = tl.where((flags & 8) != 0, 0.0, grad * rstd.to(x.dtype))
        out = tl.where(_real(mask_ptr, cols, inside, MASKED), real_grad, masked_grad)
        tl.store(out_ptr + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


def _rows(t: Tensor, trailing: int) -> Tensor:
    """As [rows, length] with contiguous columns; copies where no view does."""
    length = t.shape[t.dim() - trailing :].numel()
    t = t.reshape(t.numel() // length, length)
    return t if t.stride(1) == 1 or length == 1 else t.contiguous()


def _chunk(length: int) -> int:
    """Elements of a program's share of a row; a function of the length alone."""
    return length if length <= LONG else BLOCK * cdiv(length, BLOCK * CHUNKS)


def _operands(x: Tensor, mask: Tensor | None, trailing: int) -> tuple[Tensor, Tensor, int]:
    rows = _rows(x, trailing)
    real = rows if mask is None else _rows(mask, trailing).view(torch.uint8)
    return rows, real, _chunk(rows.shape[1])


def _parts(x: Tensor, chunks: int, width: int) -> Tensor:
    return torch.empty((x.shape[0], chunks, width) if chunks > 1 else 0, dtype=torch.float64, device=x.device)


def _launch_moments(rows: Tensor, real: Tensor, parts: Tensor, chunk: int, masked: bool) -> None:
    length = rows.shape[1]
    launch(
        moments_kernel, (rows.shape[0], cdiv(length, chunk)), rows,
        rows, real, parts, rows.stride(0), real.stride(0), length, chunk,
        MASKED=masked, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def forward(x: Tensor, mask: Tensor | None, trailing: int, eps: float, flags: int) -> Tensor:
    """Normalises the last `trailing` dimensions."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows, real, chunk = _operands(x, mask, trailing)
    n_rows, length = rows.shape
    chunks = cdiv(length, chunk)
    parts = _parts(rows, chunks, 3)
    masked = mask is not None
    if chunks > 1:
        _launch_moments(rows, real, parts, chunk, masked)
    launch(
        forward_kernel, (n_rows, chunks), rows,
        rows, real, parts, out, rows.stride(0), real.stride(0), length, chunk,
        argument(eps, x), flags,
        MASKED=masked, HIDE=masked and bool(flags & ZERO_MASKED), SPLIT=chunks > 1, BLOCK=BLOCK,
        CHUNKS=CHUNKS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, mask: Tensor | None, trailing: int, eps: float, flags: int) -> Tensor:
    """Gradient of x; the moments are taken again instead of stored."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    rows, real, chunk = _operands(x, mask, trailing)
    n_rows, length = rows.shape
    chunks = cdiv(length, chunk)
    parts, sums = _parts(rows, chunks, 3), _parts(rows, chunks, 2)
    masked = mask is not None
    dy = grad.contiguous()
    shape = (rows.stride(0), real.stride(0), length, chunk)
    meta = {"MASKED": masked, "BLOCK": BLOCK, "CHUNKS": CHUNKS, "num_warps": NUM_WARPS}
    if chunks > 1:
        _launch_moments(rows, real, parts, chunk, masked)
        launch(sums_kernel, (n_rows, chunks), rows, dy, rows, real, parts, sums, *shape, flags, **meta)
    launch(
        backward_kernel, (n_rows, chunks), rows,
        dy, rows, real, parts, sums, out, *shape, argument(eps, x), flags, SPLIT=chunks > 1, **meta,
    )  # fmt: skip
    return out
