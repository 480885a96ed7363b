"""The definition of logprob."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def forward(logits: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(target) and -sum p log p for p = softmax(z), z = logits / temperature.

    And the largest z and log sum exp(z - largest), whose sum is the log of the softmax's denominator: what a
    backward needs to do without another pass, in two parts since their sum has fewer digits.
    """
    wide = logits.double()
    largest = wide.amax(-1)
    # Differences first: beside a large peak neither they nor log_total would have digits.
    shifted = (wide - largest.unsqueeze(-1)) / temperature
    log_total = shifted.logsumexp(-1)
    log_p = shifted - log_total.unsqueeze(-1)
    peak = largest / temperature
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0)).sum(-1)  # p log p is 0 at p = 0
    logprob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logprob.to(dtype), entropy.to(dtype), peak.to(dtype), log_total.to(dtype)


def logprob(logits: Tensor, target: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The definition with the public function's signature."""
    return forward(logits, target, temperature)[:2]
