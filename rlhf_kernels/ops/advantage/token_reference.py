"""The definition of token_advantages: the definitions of gae and masked_normalize on shaped rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops.advantage import reference as gae
from rlhf_kernels.ops.normalize import reference as normalize

DIFFERENTIABLE = True


def last_real(mask: Tensor) -> Tensor:
    """[B, T]: True at the last real step of each row, nowhere in a row without one."""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def token_rewards(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl at real steps, and the score added at the last of them."""
    penalty = torch.where(mask, -kl_coef * kl, 0)
    return penalty + torch.where(last_real(mask), score[:, None], 0)


def forward(
    score: Tensor, kl: Tensor, values: Tensor, mask: Tensor,
    kl_coef: float, gamma: float, lam: float, carry: bool, normalized: bool, eps: float, flags: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages, normalised over the real steps of the batch, and returns; 0 at masked steps."""
    rewards = token_rewards(score, kl, mask, kl_coef)
    advantages, returns = gae.forward(rewards, values, mask, None, None, None, gamma, lam, carry)
    if normalized:
        advantages = normalize.forward(advantages, mask, 2, eps, flags)
    return torch.where(mask, advantages, 0), torch.where(mask, returns, 0)
