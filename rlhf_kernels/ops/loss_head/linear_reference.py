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
    ranked: bool = False,
) -> tuple[Tensor, ...]:
    """logprob of hidden @ weight.T + bias, capped; zeros, and no gradient, where the target is ignored.

    The last two results, mean logit and whether the target is the largest, are empty unless `ranked`."""
    real = target != ignore_index
    logits = torch.where(real[:, None], hidden, 0).double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprob, entropy, *rest = reference.forward(logits, target.where(real, 0), temperature)
    results = (torch.where(real, logprob, 0), torch.where(real, entropy, 0), *rest)
    mean, is_top = logits.mean(-1).detach() / temperature, logits.argmax(-1) == target
    more = (mean.where(real, 0), is_top & real) if ranked else (mean[:0], is_top[:0])
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return *(result.to(dtype) for result in (*results, more[0])), more[1]


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
