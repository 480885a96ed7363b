"""logprob in plain PyTorch, a block of rows at a time; linear_logprob calls it on the logits it computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rlhf_kernels.runtime.launch import cdiv

# Logits in work at a time: what a CPU's cache holds in float32; a GPU takes more, to outlast the launches.
BLOCK = 1 << 20
_GPU_BLOCKS = 32
# exp is 0 below; a bound that is finite, since 0 * -inf would be NaN.
_VANISHED = -1e4


def spans(n_rows: int, most: int) -> Iterator[slice]:
    """Slices of nearly equal length, at most `most`: a short last one would cost as much as a long one."""
    step = cdiv(n_rows, cdiv(n_rows, most)) if n_rows else 1
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def _blocks(rows: Tensor, dtype: torch.dtype, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows, each with a [2, n, V] whose first part holds z = rows / temperature."""
    n_rows, vocabulary = rows.shape
    most = max(1, (BLOCK if rows.device.type == "cpu" else BLOCK * _GPU_BLOCKS) // vocabulary)
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
    rows, ids = logits.reshape(-1, logits.shape[-1]), target.reshape(-1, 1)
    results = tuple(rows.new_empty(target.shape, dtype=dtype) for _ in range(4))
    logprob, entropy, peak, log_total = (result.view(-1) for result in results)
    for part, work in _blocks(rows, dtype, temperature):
        z, p = work
        largest = z.amax(-1, keepdim=True)
        chosen = z.sub_(largest).gather(-1, ids[part]).squeeze(-1)
        torch.exp(z.clamp_(min=_VANISHED), out=p)
        z.mul_(p)
        # Both sums at once, since PyTorch adds up a single row by several threads, in another order than two.
        moment, total = work.sum(-1)
        peak[part], log_total[part] = largest.squeeze(-1), total.log()
        logprob[part] = chosen - log_total[part]
        entropy[part] = log_total[part] - moment / total
    return results


def logit_gradient(
    rows: Tensor, ids: Tensor, by_row: Sequence[Tensor], temperature: float, out: Tensor
) -> Tensor:
    """Gradient of logits [N, V], written to `out`, which may be the logits themselves.

    By row: entropy, peak, log total, gradient of logprob, gradient of entropy. With z = logits / temperature,
    d logprob / dz = onehot(target) - p and d entropy / dz = -p (log p + entropy).
    """
    ids, columns = ids.unsqueeze(-1), [t.unsqueeze(-1) for t in by_row]
    for part, work in _blocks(rows, by_row[0].dtype, temperature):
        z, p = work
        entropy, peak, log_total, grad_logprob, grad_entropy = (t[part] for t in columns)
        torch.exp(z.sub_(peak).sub_(log_total).clamp_(min=_VANISHED), out=p)
        z.mul_(-grad_entropy).sub_(grad_logprob + grad_entropy * entropy).mul_(p)
        z.scatter_add_(-1, ids[part], grad_logprob)
        out[part] = z if temperature == 1.0 else z.div_(temperature)
    return out


def without_target(
    grad: Tensor, first: Tensor, ids: Tensor, by_row: Sequence[Tensor], temperature: float
) -> None:
    """Mends the gradient of the first logits, which are given, in rows whose target (-1) is in another
    process's share of the vocabulary: it was computed as if the first were the target."""
    pairs = torch.stack((first, torch.full_like(first, -torch.inf)), -1)  # the second takes the target's part
    found = logit_gradient(pairs, torch.ones_like(ids), by_row, temperature, torch.empty_like(pairs))
    grad[:, 0] = torch.where(ids < 0, found[:, 0].to(grad.dtype), grad[:, 0])


def log_sum_squares(rows: Tensor, peak: Tensor, log_total: Tensor, temperature: float) -> Tensor:
    """log sum p^2 of logits [N, V]."""
    found = torch.empty_like(peak)
    for part, (z, _) in _blocks(rows, peak.dtype, temperature):
        z.sub_(peak[part, None]).mul_(2).exp_()
        found[part] = z.sum(-1).log_() - 2 * log_total[part]
    return found


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
    rows = logits.reshape(-1, logits.shape[-1])
    by_row = [t.reshape(-1) for t in (entropy, peak, log_total, grad_logprob, grad_entropy)]
    grad = torch.empty(rows.shape, dtype=logits.dtype, device=logits.device)
    return logit_gradient(rows, target.reshape(-1), by_row, temperature, grad).view(logits.shape)


def logprob(logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log_softmax and its entropy with autograd, as one would write it: the public function's signature."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=_VANISHED)).sum(-1)
    return log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1), entropy
