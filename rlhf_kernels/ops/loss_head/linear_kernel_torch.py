"""linear_logprob in plain PyTorch: the logits of some rows at a time, computed again for the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_kernels.ops.loss_head import kernel_torch
from rlhf_kernels.ops.loss_head.kernel_torch import logit_gradient, spans

# Rows in work at a time: fewer read the weight too often, more only take memory.
ROWS = 512


def _blocks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ignored: Tensor, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the rows, their hidden states, and their logits, which the next step overwrites.

    16-bit logits are rounded to 16 bits, as a model's own are. Ignored rows enter as zeros, so that what
    stands there, NaN included, stays there.
    """
    memory = hidden.new_empty((min(len(hidden), ROWS), len(weight)))
    for part in spans(len(hidden), ROWS):
        rows = hidden[part].masked_fill(ignored[part, None], 0)
        logits = memory[: len(rows)]
        if bias is None:
            torch.mm(rows, weight.t(), out=logits)
        else:
            torch.addmm(bias, rows, weight.t(), out=logits)
        if softcap is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits.div_(softcap).tanh_().mul_(softcap)
        yield part, rows, logits


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
    ignored = target == ignore_index
    ids = target.masked_fill(ignored, 0)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    results = tuple(hidden.new_empty(target.shape, dtype=dtype) for _ in range(4))
    for part, _, logits in _blocks(hidden, weight, bias, ignored, softcap):
        for result, found in zip(results, kernel_torch.forward(logits, ids[part], temperature)):
            result[part] = found
    for result in results[:2]:
        result.masked_fill_(ignored, 0)
    return results


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
    by_row = (entropy, peak, log_total, *(g.masked_fill(ignored, 0) for g in (grad_logprob, grad_entropy)))
    to_hidden, to_weight, to_bias = wanted
    grad_hidden = torch.empty(hidden.shape if to_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.zeros(weight.shape if to_weight else 0, dtype=peak.dtype, device=weight.device)
    grad_bias = torch.zeros(len(weight) if to_bias else 0, dtype=peak.dtype, device=weight.device)
    for part, rows, logits in _blocks(hidden, weight, bias, ignored, softcap):
        # The slope of softcap * tanh(x / softcap), from its value.
        slope = None if softcap is None else 1 - (logits / softcap).square_()
        grad = logit_gradient(logits, ids[part], [t[part] for t in by_row], temperature, out=logits)
        if slope is not None:
            grad = grad.mul_(slope).to(hidden.dtype)
        if to_hidden:
            torch.mm(grad, weight, out=grad_hidden[part])
        if to_weight:
            _add_product(grad_weight, grad.t(), rows)
        if to_bias:
            grad_bias.add_(grad.sum(0, dtype=peak.dtype))
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, without an intermediate where the dtypes allow it."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(a @ b)


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
