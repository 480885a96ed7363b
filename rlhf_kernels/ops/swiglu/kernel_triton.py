"""swiglu in Triton: each program takes a block of columns of one row, every operand moves once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.runtime.launch import cdiv, launch
from rlhf_kernels.runtime.triton_lib import sigmoid, to_float32

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def swiglu_forward_kernel(x_ptr, gate_ptr, out_ptr, x_stride, gate_stride, n_cols, BLOCK: tl.constexpr):
    """out = silu(gate) * x; x and gate are rows of n_cols, out is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    x = to_float32(tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0))
    gate = to_float32(tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0))
    out = gate * sigmoid(gate) * x
    tl.store(out_ptr + row * n_cols + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr, x_ptr, gate_ptr, grad_x_ptr, grad_gate_ptr,
    grad_stride, x_stride, gate_stride, out_stride, n_cols, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of both operands; the sigmoid is computed again instead of stored."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    grad = to_float32(tl.load(grad_ptr + row * grad_stride + cols, mask=inside, other=0.0))
    x = to_float32(tl.load(x_ptr + row * x_stride + cols, mask=inside, other=0.0))
    gate = to_float32(tl.load(gate_ptr + row * gate_stride + cols, mask=inside, other=0.0))
    s = sigmoid(gate)
    grad_x = grad * gate * s
    grad_gate = grad * x * s * (1.0 + gate * (1.0 - s))
    element = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + row * out_stride + cols, grad_x.to(element), mask=inside)
    tl.store(grad_gate_ptr + row * out_stride + cols, grad_gate.to(element), mask=inside)


def _rows(t: Tensor) -> Tensor:
    """As [rows, columns] with contiguous columns; copies where no view does."""
    t = t.reshape(-1, t.shape[-1]) if t.shape[-1] else t.new_empty((0, 0))
    return t if t.stride(-1) == 1 else t.contiguous()


def _operands(x: Tensor, gate: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    if gate is not None:
        return rows, _rows(gate)
    first, second = rows.chunk(2, dim=-1)
    return (second, first) if gate_first else (first, second)


def forward(x: Tensor, gate: Tensor | None, gate_first: bool) -> Tensor:
    """silu(gate) * x."""
    left, right = _operands(x, gate, gate_first)
    out = x.new_empty((*x.shape[:-1], left.shape[-1]))
    n_rows, n_cols = left.shape
    launch(
        swiglu_forward_kernel, (n_rows, cdiv(n_cols, BLOCK)), x,
        left, right, out, left.stride(0), right.stride(0), n_cols, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def backward(grad: Tensor, x: Tensor, gate: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and gate; the second is empty when x is packed."""
    left, right = _operands(x, gate, gate_first)
    dy = _rows(grad)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_gate = torch.empty(0 if gate is None else gate.shape, dtype=x.dtype, device=x.device)
    to_x, to_gate = _operands(grad_x, None if gate is None else grad_gate, gate_first)
    n_rows, n_cols = left.shape
    launch(
        swiglu_backward_kernel, (n_rows, cdiv(n_cols, BLOCK)), x,
        dy, left, right, to_x, to_gate,
        dy.stride(0), left.stride(0), right.stride(0), to_x.stride(0), n_cols,
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_x, grad_gate
