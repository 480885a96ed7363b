"""The definition of linear_logprob."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops.loss_head import reference

DIFFERENTIABLE = True


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    more: int = 0,
) -> tuple[Tensor, ...]:
    """logprob of hidden @ weight.T + bias, capped; zeros, and no gradient, where the target is ignored.

    The last three are empty unless the bits of `more` ask for them: mean logit (1), whether the target is the
    first of the largest (2), log sum p^2 (4)."""
    real = target != ignore_index
    logits = torch.where(real[:, None], hidden, 0).double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprob, entropy, *rest = reference.forward(logits, target.where(real, 0), temperature)
    results = (torch.where(real, logprob, 0), torch.where(real, entropy, 0), *rest)
    z = logits.detach() / temperature
    mean, is_top = z.mean(-1).where(real, 0), (logits.argmax(-1) == target) & real
    log_squares = (2 * z.log_softmax(-1)).logsumexp(-1).where(real, 0)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    asked = [
        x if more & bit else x[:0]
        for x, bit in ((mean.to(dtype), 1), (is_top, 2), (log_squares.to(dtype), 4))
    ]
    return *(result.to(dtype) for result in results), *asked


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
    """The definition with the public function's signature."""
    return forward(hidden, weight, bias, target, temperature, softcap, ignore_index)[:2]
