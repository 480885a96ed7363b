"""logprob in Triton: one pass over a row, and one that writes the gradient, in place if asked to."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_kernels.runtime.launch import cdiv, launch, row_groups
from rlhf_kernels.runtime.launch import number as argument
from rlhf_kernels.runtime.triton_lib import number, row_start, to_float32

BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _scaled(ptr, cols, size, temperature):
    """Logits over the temperature; -inf beyond the row."""
    z = to_float32(tl.load(ptr + cols, mask=cols < size, other=float("-inf")))
    return z / temperature


@triton.jit
def _difference(a, b):
    """a - b, bounded where exp is 0, since 0 * -inf would be NaN; NaN stays."""
    d = a - b
    return tl.where(d < -1e4, -1e4, d)


@triton.jit(do_not_specialize=["group"])
def forward_kernel(
    logits_ptr, target_ptr, logprob_ptr, entropy_ptr, peak_ptr, log_total_ptr,
    stride, group, apart, size, temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the largest z so far, and the sums of exp(z - largest) and (z - largest) exp(z - largest)."""
    row = tl.program_id(0).to(tl.int64)
    temperature = number(temperature, logits_ptr)
    logits_ptr += row_start(tl.program_id(0), stride, group, apart)
    element = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    peak = tl.full((), float("-inf"), element)
    total = tl.full((), 0.0, element)
    moment = tl.full((), 0.0, element)
    for start in range(0, size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        z = _scaled(logits_ptr, cols, size, temperature)
        larger = tl.maximum(peak, tl.max(z, 0))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # so far all masked
        moved = _difference(peak, base)
        shrink = tl.exp(moved)
        moment = shrink * (moment + moved * total)
        away = _difference(z, base)
        p = tl.where(cols < size, tl.exp(away), 0.0)
        total = shrink * total + tl.sum(p, 0)
        moment += tl.sum(away * p, 0)
        peak = larger
    target = tl.load(target_ptr + row)
    # A target outside of the vocabulary, which only the CPU checks, gives NaN and reads nothing.
    within = (target >= 0) & (target < size)
    chosen = to_float32(tl.load(logits_ptr + target, mask=within, other=float("nan")))
    log_total = tl.log(total)
    tl.store(logprob_ptr + row, chosen / temperature - peak - log_total)
    tl.store(entropy_ptr + row, log_total - moment / total)
    tl.store(peak_ptr + row, peak)
    tl.store(log_total_ptr + row, log_total)


@triton.jit(do_not_specialize=["group"])
def backward_kernel(
    logits_ptr, target_ptr, entropy_ptr, peak_ptr, log_total_ptr, grad_logprob_ptr, grad_entropy_ptr, out_ptr,
    stride, group, apart, out_stride, size, temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """d logprob / dz = onehot(target) - p and d entropy / dz = -p (log p + entropy)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    temperature = number(temperature, logits_ptr)
    z = _scaled(logits_ptr + row_start(tl.program_id(0), stride, group, apart), cols, size, temperature)
    log_p = _difference(z - tl.load(peak_ptr + row), tl.load(log_total_ptr + row))
    to_logprob = tl.load(grad_logprob_ptr + row)
    to_entropy = tl.load(grad_entropy_ptr + row)
    grad = -tl.exp(log_p) * (to_entropy * (log_p + tl.load(entropy_ptr + row)) + to_logprob)
    grad += tl.where(cols == tl.load(target_ptr + row), to_logprob, 0.0)
    grad = grad / temperature
    tl.store(out_ptr + row * out_stride + cols, grad.to(out_ptr.dtype.element_ty), mask=cols < size)


def forward(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, largest z and log sum exp(z - largest)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    results = tuple(torch.empty(target.shape, dtype=dtype, device=logits.device) for _ in range(4))
    logits, stride, group, apart = row_groups(logits)
    launch(
        forward_kernel, (target.numel(),), logits,
        logits, target.contiguous(), *results, stride, group, apart, logits.shape[-1],
        argument(temperature, logits), BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    return results


def differentiate(
    logits: Tensor, target: Tensor, by_row: tuple[Tensor, ...], temperature: float, out: Tensor
) -> None:
    """Writes the gradient of logits [..., V] to `out` [N, V], which may be the logits.

    By row: entropy, peak, log total, gradient of logprob, gradient of entropy.
    """
    logits, stride, group, apart = row_groups(logits)
    launch(
        backward_kernel, (len(out), cdiv(out.shape[1], BLOCK)), logits,
        logits, target.contiguous(), *(t.contiguous() for t in by_row), out,
        stride, group, apart, out.stride(0), out.shape[1], argument(temperature, logits),
        BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    target: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    temperature: float,
) -> Tensor:
    """Gradient of the logits."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    by_row = (entropy, peak, log_total, grad_logprob, grad_entropy)
    differentiate(logits, target, by_row, temperature, grad.view(-1, logits.shape[-1]))
    return grad
