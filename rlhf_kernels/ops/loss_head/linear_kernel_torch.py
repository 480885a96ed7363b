"""linear_logprob in plain PyTorch: the logits of some rows at a time, computed again for the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.ops.loss_head import kernel_torch
from rlhf_kernels.ops.loss_head.kernel_torch import logit_gradient, spans, statistics

# Rows in work at a time. 512 cost 1.05 times the bare products, 128 cost 1.35 times, for each pass over them
# reads the whole weight.
ROWS = 512


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out = rows @ weight.T + bias; 16-bit logits are rounded to 16 bits, as a model's own are."""
    if rows.dtype != out.dtype:
        return out.copy_(F.linear(rows, weight, bias))
    torch.mm(rows, weight.t(), out=out)
    return out if bias is None else out.add_(bias)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, without an intermediate where the dtypes allow it."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)


def _blocks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ignored: Tensor,
    temperature: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the rows, their hidden states, and [2, n, V] whose first part holds their logits.

    Ignored rows enter as zeros, so that what stands there, NaN included, stays there.
    """
    memory = hidden.new_empty((2, min(len(hidden), ROWS), len(weight)), dtype=dtype)
    for part in spans(len(hidden), ROWS):
        rows = hidden[part].masked_fill(ignored[part, None], 0)
        work = memory[:, : len(rows)]
        logits = _linear(rows, weight, bias, work[0])
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        if temperature != 1.0:
            logits.div_(temperature)
        yield part, rows, work


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, largest z and log sum exp(z - largest)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ignored = target == ignore_index
    ids = target.masked_fill(ignored, 0)
    results = [hidden.new_empty(target.shape, dtype=dtype) for _ in range(4)]
    for part, _, work in _blocks(hidden, weight, bias, ignored, temperature, softcap, dtype):
        for result, found in zip(results, statistics(work, ids[part])):
            result[part] = found
    for result in results[:2]:
        result.masked_fill_(ignored, 0)
    return tuple(results)


def backward(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where not wanted. Sums over rows are kept in float32."""
    ignored = target == ignore_index
    ids = target.masked_fill(ignored, 0)
    grads = [g.masked_fill(ignored, 0) / temperature for g in (grad_logprob, grad_entropy)]
    by_row = (entropy, peak, log_total, *grads)
    to_hidden, to_weight, to_bias = wanted
    grad_hidden = torch.empty(hidden.shape if to_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.zeros(weight.shape if to_weight else 0, dtype=peak.dtype, device=weight.device)
    grad_bias = torch.zeros(len(weight) if to_bias else 0, dtype=peak.dtype, device=weight.device)
    for part, rows, work in _blocks(hidden, weight, bias, ignored, temperature, softcap, peak.dtype):
        # The slope of softcap * tanh(x / softcap), from its value.
        slope = None if softcap is None else 1 - (work[0] * (temperature / softcap)).square_()
        grad = logit_gradient(work, ids[part], *(t[part] for t in by_row))
        if slope is not None:
            grad.mul_(slope)
        if to_bias:
            grad_bias.add_(grad.sum(0))
        grad = grad.to(hidden.dtype)
        if to_hidden:
            torch.mm(grad, weight, out=grad_hidden[part])
        if to_weight:
            _add_product(grad_weight, grad.t(), rows)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """All logits at once and autograd, as one would write it: the public function's signature."""
    ignored = target == ignore_index
    logits = F.linear(hidden.masked_fill(ignored[:, None], 0), weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    found = kernel_torch.logprob(logits, target.masked_fill(ignored, 0), temperature=temperature)
    return found[0].masked_fill(ignored, 0), found[1].masked_fill(ignored, 0)
