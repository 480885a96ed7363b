"""layer_norm and rms_norm in Triton: a row is read once, in registers up to LONG elements, else in blocks.

The backward goes through some rows a program, and the gradients of weight and bias are sums over these:
partial sums, one row of them a program, added in their order. Nothing is atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.runtime.launch import cdiv, launch
from rlhf_kernels.runtime.launch import number as argument
from rlhf_kernels.runtime.triton_lib import number, to_float32

# Elements of a row that are kept in registers, 16 a thread.
LONG = 8192
# Programs that share the rows of a backward, at most: a function of the shape alone.
PARTS = 256


@triton.jit
def _row(x_ptr, residual_ptr, cols, inside, ADDS: tl.constexpr):
    """x, or x + residual as x's type holds it."""
    x = tl.load(x_ptr + cols, mask=inside, other=0.0)
    if ADDS:
        more = tl.load(residual_ptr + cols, mask=inside, other=0.0)
        x = (to_float32(x) + to_float32(more)).to(x.dtype)
    return to_float32(x)


@triton.jit
def _scale(squares, rest, n, eps):
    """1 / std of values whose squares about a rounded mean were summed; `rest` is what rounding left over."""
    return 1.0 / tl.sqrt(tl.maximum(squares / n - rest * rest, 0.0) + eps)


@triton.jit
def _statistics(x, inside, size, eps, CENTER: tl.constexpr):
    """Mean as rounded, 1 / std and (rounded mean - mean) / std of a row in registers."""
    n = tl.cast(size, x.dtype)  # a size of 1 is a constant
    mean = tl.sum(x, 0) / n if CENTER else tl.sum(x, 0) * 0.0
    away = tl.where(inside, x - mean, 0.0) if CENTER else x
    rest = tl.sum(away, 0) / n if CENTER else mean
    scale = _scale(tl.sum(away * away, 0), rest, n, eps)
    return mean, scale, -rest * scale


@triton.jit
def _long_statistics(
    x_ptr, residual_ptr, size, eps, CENTER: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The same of a row in blocks."""
    element = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.cast(size, element)
    total = tl.zeros((BLOCK,), element)
    squares = tl.zeros((BLOCK,), element)
    if CENTER:
        for start in range(0, size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            total += _row(x_ptr, residual_ptr, cols, cols < size, ADDS)
    mean = tl.sum(total, 0) / n
    total = tl.zeros((BLOCK,), element)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        away = tl.where(cols < size, _row(x_ptr, residual_ptr, cols, cols < size, ADDS) - mean, 0.0)
        total += away
        squares += away * away
    rest = tl.sum(total, 0) / n if CENTER else mean
    scale = _scale(tl.sum(squares, 0), rest, n, eps)
    return mean, scale, -rest * scale


@triton.jit
def _parameter(ptr, cols, inside, like):
    return tl.load(ptr + cols, mask=inside, other=0.0).to(like.dtype)


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, summed_ptr, statistics_ptr,
    x_stride, residual_stride, size, eps, weight_offset,
    CENTER: tl.constexpr, ADDS: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    eps, weight_offset = number(eps, x_ptr), number(weight_offset, x_ptr)
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    out_ptr += row * size
    summed_ptr += row * size
    cols = tl.arange(0, BLOCK)
    if WHOLE:
        x = _row(x_ptr, residual_ptr, cols, cols < size, ADDS)
        mean, scale, shift = _statistics(x, cols < size, size, eps, CENTER)
    else:
        mean, scale, shift = _long_statistics(x_ptr, residual_ptr, size, eps, CENTER, ADDS, BLOCK)
    tl.store(statistics_ptr + 3 * row, mean)
    tl.store(statistics_ptr + 3 * row + 1, scale)
    tl.store(statistics_ptr + 3 * row + 2, shift)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < size
        if not WHOLE:
            x = _row(x_ptr, residual_ptr, cols, inside, ADDS)
        y = (x - mean) * scale + shift
        y *= _parameter(weight_ptr, cols, inside, y) + weight_offset
        if BIAS:
            y += _parameter(bias_ptr, cols, inside, y)
        tl.store(out_ptr + cols, y.to(out_ptr.dtype.element_ty), mask=inside)
        if ADDS:
            tl.store(summed_ptr + cols, x.to(summed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _terms(
    grad_ptr, x_ptr, weight_ptr, cols, size, mean, scale, shift, weight_offset
):  # fmt: skip
    """The gradient of the output, the normalised row, and the gradient of that, with 0 beyond the row."""
    inside = cols < size
    x = to_float32(tl.load(x_ptr + cols, mask=inside, other=0.0))
    dy = to_float32(tl.load(grad_ptr + cols, mask=inside, other=0.0))
    y = tl.where(inside, (x - mean) * scale + shift, 0.0)
    return dy, y, dy * (_parameter(weight_ptr, cols, inside, dy) + weight_offset)


@triton.jit
def _write(
    to_ptr, also_ptr, cols, size, y, s, average, slope, scale, ALSO: tl.constexpr
):  # fmt: skip
    """(s - mean(s) - y mean(s y)) / std, and what reaches the row beside the norm."""
    found = (s - average - y * slope) * scale
    if ALSO:
        found += to_float32(tl.load(also_ptr + cols, mask=cols < size, other=0.0))
    tl.store(to_ptr + cols, found.to(to_ptr.dtype.element_ty), mask=cols < size)


@triton.jit
def backward_kernel(
    grad_ptr, also_ptr, x_ptr, weight_ptr, statistics_ptr, grad_x_ptr, by_weight_ptr, by_bias_ptr,
    grad_stride, also_stride, x_stride, rows, share, size, eps, weight_offset,
    CENTER: tl.constexpr, ALSO: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`share` rows: their gradients, and their sums for weight and bias."""
    part = tl.program_id(0).to(tl.int64)
    element = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    n = tl.cast(size, element)
    eps, weight_offset = number(eps, x_ptr), number(weight_offset, x_ptr)
    by_weight_ptr += part * size
    by_bias_ptr += part * size
    cols = tl.arange(0, BLOCK)
    by_weight = tl.zeros((BLOCK,), element)
    by_bias = tl.zeros((BLOCK,), element)
    for r in range(0, share):
        row = part * share + r
        if row < rows:
            mean = tl.load(statistics_ptr + 3 * row)
            scale = tl.load(statistics_ptr + 3 * row + 1)
            shift = tl.load(statistics_ptr + 3 * row + 2)
            if scale == 0.0:  # nothing was kept
                mean, scale, shift = _long_statistics(
                    x_ptr + row * x_stride, x_ptr, size, eps, CENTER, False, BLOCK
                )  # fmt: skip
            from_ptr, at_ptr = grad_ptr + row * grad_stride, x_ptr + row * x_stride
            to_ptr, more_ptr = grad_x_ptr + row * size, also_ptr + row * also_stride
            if WHOLE:
                dy, y, s = _terms(from_ptr, at_ptr, weight_ptr, cols, size, mean, scale, shift, weight_offset)
                by_weight += dy * y
                by_bias += dy
                average = tl.sum(s, 0) / n if CENTER else mean * 0.0
                _write(to_ptr, more_ptr, cols, size, y, s, average, tl.sum(s * y, 0) / n, scale, ALSO)
            else:
                first = tl.zeros((BLOCK,), element)
                second = tl.zeros((BLOCK,), element)
                for start in range(0, size, BLOCK):
                    at = start + tl.arange(0, BLOCK)
                    dy, y, s = _terms(
                        from_ptr, at_ptr, weight_ptr, at, size, mean, scale, shift, weight_offset
                    )
                    first += s
                    second += s * y
                    # The program's own row of sums, where the same thread finds what it wrote.
                    so_far = tl.load(by_weight_ptr + at, mask=(at < size) & (r > 0), other=0.0)
                    tl.store(by_weight_ptr + at, so_far + dy * y, mask=at < size)
                    if BIAS:
                        so_far = tl.load(by_bias_ptr + at, mask=(at < size) & (r > 0), other=0.0)
                        tl.store(by_bias_ptr + at, so_far + dy, mask=at < size)
                average = tl.sum(first, 0) / n if CENTER else mean * 0.0
                slope = tl.sum(second, 0) / n
                for start in range(0, size, BLOCK):
                    at = start + tl.arange(0, BLOCK)
                    _, y, s = _terms(
                        from_ptr, at_ptr, weight_ptr, at, size, mean, scale, shift, weight_offset
                    )
                    _write(to_ptr, more_ptr, at, size, y, s, average, slope, scale, ALSO)
    if WHOLE:
        tl.store(by_weight_ptr + cols, by_weight, mask=cols < size)
        if BIAS:
            tl.store(by_bias_ptr + cols, by_bias, mask=cols < size)


def block_of(size: int) -> int:
    """Elements that a program holds of a row."""
    return max(128, min(triton.next_power_of_2(size), LONG))


def warps_of(block: int) -> int:
    """Warps for so many elements, 16 a thread."""
    return max(1, block // 512)


def _rows(t: Tensor) -> Tensor:
    """As [rows, columns] with contiguous columns; copies where no view does."""
    t = t.reshape(-1, t.shape[-1]) if t.shape[-1] else t.new_empty((0, 0))
    return t if t.stride(-1) == 1 else t.contiguous()


def _blocks(size: int) -> dict[str, int]:
    block = block_of(size)
    return {"WHOLE": size <= block, "BLOCK": block, "num_warps": warps_of(block)}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of x, or of x + residual; the sum; and what the backward needs of each row."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = torch.empty(0 if residual is None else x.shape, dtype=x.dtype, device=x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    statistics = torch.empty((*x.shape[:-1], 3), dtype=wide, device=x.device)
    rows = _rows(x)
    added = rows if residual is None else _rows(residual)
    weight, bias = weight.contiguous(), weight if bias is None else bias.contiguous()
    launch(
        forward_kernel, (rows.shape[0],), x,
        rows, added, weight, bias, out, summed, statistics,
        rows.stride(0), added.stride(0), rows.shape[1],
        argument(eps, x), argument(weight_offset, x),
        CENTER=center, ADDS=residual is not None, BIAS=bias is not weight, **_blocks(rows.shape[1]),
    )  # fmt: skip
    return out, summed, statistics


def backward(
    grad: Tensor,
    grad_summed: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    statistics: Tensor,
    eps: float,
    weight_offset: float,
    center: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows that were normalised, of the weight, and of the bias (empty without one)."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, dy = _rows(x), _rows(grad)
    also = dy if grad_summed is None else _rows(grad_summed)
    n_rows, size = rows.shape
    share = max(1, cdiv(n_rows, PARTS))
    parts = cdiv(n_rows, share)
    sums = torch.empty((parts, weight.shape[0]), dtype=statistics.dtype, device=x.device)
    bias_sums = sums if bias is None else torch.empty_like(sums)
    launch(
        backward_kernel, (parts,), x,
        dy, also, rows, weight.contiguous(), statistics.contiguous(), grad_x, sums, bias_sums,
        dy.stride(0), also.stride(0), rows.stride(0), n_rows, share, size,
        argument(eps, x), argument(weight_offset, x),
        CENTER=center, ALSO=grad_summed is not None, BIAS=bias is not None, **_blocks(size),
    )  # fmt: skip
    grad_bias = weight.new_empty(0) if bias is None else bias_sums.sum(0).to(weight.dtype)
    return grad_x, sums.sum(0).to(weight.dtype), grad_bias
