"""token_advantages in plain PyTorch, on the plain forms of gae and masked_normalize."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops.advantage import kernel_torch as gae
from rlhf_kernels.ops.advantage.token_reference import token_rewards
from rlhf_kernels.ops.normalize import kernel_torch as normalize

DIFFERENTIABLE = True


def forward(
    score: Tensor, kl: Tensor, values: Tensor, mask: Tensor,
    kl_coef: float, gamma: float, lam: float, carry: bool, normalized: bool, eps: float, flags: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and returns; 16-bit inputs are computed in float32 throughout."""
    dtype = values.dtype
    score, kl, values = (normalize.upcast(x) for x in (score, kl, values))
    rewards = token_rewards(score, kl, mask, kl_coef)
    advantages, returns = gae.forward(rewards, values, mask, None, None, None, gamma, lam, carry)
    if normalized:
        advantages = normalize.forward(advantages, mask, 2, eps, flags)
    return torch.where(mask, advantages, 0).to(dtype), torch.where(mask, returns, 0).to(dtype)
