"""GAE as training stacks write it: a Python loop over time, a handful of small tensor operations per step.

TRL (`PPOTrainer.train`) and OpenRLHF (`get_advantages_and_returns`) have this form; where those packages are
installed, `rlhf_kernels.stacks` runs theirs instead. Here it is for machines that have neither.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [B, T]; a mask multiplies values and rewards before, as in OpenRLHF."""
    if mask is not None:
        rewards, values = rewards * mask, values * mask
    steps = rewards.shape[1]
    advantage, reversed_advantages = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(steps)):
        next_value = values[:, t + 1] if t < steps - 1 else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, advantages + values
