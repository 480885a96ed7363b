"""logprob in plain PyTorch, a block of rows at a time.

Its statistics of a block of logits, and their derivatives, serve linear_logprob as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_kernels.runtime.launch import cdiv

# Logits in work at a time: 16 MB of float32 stay in a CPU's last cache, and outlast a launch on a GPU.
BLOCK = 1 << 22
# exp is 0 below; a bound that is finite, since 0 * -inf would be NaN.
_VANISHED = -1e4


def spans(n_rows: int, most: int) -> Iterator[slice]:
    """Slices of nearly equal length, at most `most`: a short last one would cost as much as a long one."""
    step = cdiv(n_rows, cdiv(n_rows, most)) if n_rows else 1
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def statistics(work: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What forward returns, [n] each, of the logits work[0] of [2, n, V]; both parts are overwritten."""
    z, p = work
    peak = z.amax(-1, keepdim=True)
    z.sub_(peak)
    chosen = z.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    torch.exp(z.clamp_(min=_VANISHED), out=p)
    z.mul_(p)
    # Both sums at once, since PyTorch adds up a single row by several threads, in another order than two.
    moment, total = work.sum(-1)
    log_total = total.log()
    return chosen - log_total, log_total - moment / total, peak.squeeze(-1), log_total


def logit_gradient(work: Tensor, target: Tensor, *by_row: Tensor) -> Tensor:
    """Gradient of the logits work[0] of [2, n, V], in their place; work[1] is overwritten.

    By row: entropy, peak, log total, gradient of logprob, gradient of entropy.
    d logprob / dz = onehot(target) - p and d entropy / dz = -p (log p + entropy).
    """
    z, p = work
    entropy, peak, log_total, grad_logprob, grad_entropy = (t.unsqueeze(-1) for t in by_row)
    torch.exp(z.sub_(peak).sub_(log_total).clamp_(min=_VANISHED), out=p)
    z.mul_(-grad_entropy).sub_(grad_logprob + grad_entropy * entropy).mul_(p)
    return z.scatter_add_(-1, target.unsqueeze(-1), grad_logprob)


def _blocks(rows: Tensor, dtype: torch.dtype, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows, each with a [2, n, V] whose first part holds its logits / temperature."""
    n_rows, vocabulary = rows.shape
    most = max(1, BLOCK // vocabulary)
    memory = rows.new_empty((2, min(n_rows, most), vocabulary), dtype=dtype)
    for part in spans(n_rows, most):
        work = memory[:, : part.stop - part.start]
        work[0].copy_(rows[part])
        if temperature != 1.0:
            work[0].div_(temperature)
        yield part, work


def forward(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, entropy, largest z and log sum exp(z - largest)."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows, ids = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    results = [rows.new_empty(target.shape, dtype=dtype) for _ in range(4)]
    for part, work in _blocks(rows, dtype, temperature):
        for result, found in zip(results, statistics(work, ids[part])):
            result.view(-1)[part] = found
    return tuple(results)


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
    rows, ids = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    stats = (entropy, peak, log_total, grad_logprob / temperature, grad_entropy / temperature)
    by_row = [t.reshape(-1) for t in stats]
    for part, work in _blocks(rows, peak.dtype, temperature):
        grad.view(rows.shape)[part] = logit_gradient(work, ids[part], *(t[part] for t in by_row))
    return grad


def logprob(logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log_softmax and its entropy with autograd, as one would write it: the public function's signature."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=_VANISHED)).sum(-1)
    return log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), entropy
