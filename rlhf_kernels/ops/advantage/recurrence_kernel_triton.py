"""linear_recurrence in Triton: gae's associative scan of affine maps, block after block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.ops.advantage.kernel_triton import NUM_WARPS, plane, tile
from rlhf_kernels.runtime.launch import cdiv, launch
from rlhf_kernels.runtime.triton_lib import to_float32


@triton.jit
def _then(a1, b1, a2, b2):
    """y -> b1 + a1 * y, then y -> b2 + a2 * y."""
    return a1 * a2, b2 + a2 * b1


@triton.jit
def recurrence_kernel(
    a_ptr, b_ptr, initial_ptr, y_ptr, a_stride, b_stride, initial_stride, n_rows, n_steps,
    REVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows; the state is handed from block to block, from the last to the first where REVERSE."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = row < n_rows
    element = tl.float64 if b_ptr.dtype.element_ty == tl.float64 else tl.float32
    state = tl.zeros((ROWS,), element)
    if initial_ptr is not None:
        state = to_float32(tl.load(initial_ptr + row * initial_stride, mask=there, other=0.0))
    n_blocks = tl.cdiv(n_steps, BLOCK)
    for i in range(0, n_blocks):
        start = (n_blocks - 1 - i if REVERSE else i) * BLOCK
        t = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & (t < n_steps)
        a = to_float32(tl.load(a_ptr + row[:, None] * a_stride + t, mask=inside, other=1.0))
        b = to_float32(tl.load(b_ptr + row[:, None] * b_stride + t, mask=inside, other=0.0))
        factor, y = tl.associative_scan((a, b), 1, _then, reverse=REVERSE)
        y += factor * state[:, None]
        state = tl.sum(tl.where(t == (start if REVERSE else start + BLOCK - 1), y, 0.0), 1)
        tl.store(y_ptr + row[:, None] * n_steps + t, y.to(y_ptr.dtype.element_ty), mask=inside)


def forward(a: Tensor, b: Tensor, initial: Tensor | None, reverse: bool) -> Tensor:
    """y [B, T]."""
    rows, steps = b.shape
    y = torch.empty((rows, steps), dtype=b.dtype, device=b.device)
    (a, a_stride), (b, b_stride) = plane(a), plane(b)
    tile_rows, block = tile(steps)
    launch(
        recurrence_kernel, (cdiv(rows, tile_rows) if steps else 0,), b,
        a, b, initial, y, a_stride, b_stride, 0 if initial is None else initial.stride(0), rows, steps,
        REVERSE=reverse, ROWS=tile_rows, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip
    return y
