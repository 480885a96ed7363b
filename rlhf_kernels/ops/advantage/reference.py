"""The definition of gae."""

from __future__ import annotations

import torch
from torch import Tensor

DIFFERENTIABLE = True


def forward(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    done: Tensor | None,
    truncated: Tensor | None,
    next_value: Tensor | None,
    gamma: float,
    lam: float,
    carry: bool,
) -> tuple[Tensor, Tensor]:
    """One step after the other, from the last to the first; the public function says what they are."""
    rows, steps = rewards.shape
    no = torch.zeros_like(rewards, dtype=torch.bool)
    real = ~no if mask is None else mask
    ends = no if done is None else done
    cuts = ends if truncated is None else ends | truncated
    rewards, values = torch.where(real, rewards, 0), torch.where(real, values, 0)
    per_step = next_value is not None and next_value.dim() == 2

    advantage = rewards.new_zeros(rows)
    follows = advantage if next_value is None or per_step else next_value
    advantages = []
    for t in reversed(range(steps)):
        if per_step:
            follows = torch.where(real[:, t], next_value[:, t], 0)
        delta = rewards[:, t] + gamma * torch.where(ends[:, t], 0, follows) - values[:, t]
        step = delta + gamma * lam * torch.where(cuts[:, t], 0, advantage)
        counts = real[:, t] | (not carry)
        advantage = torch.where(counts, step, advantage)
        follows = torch.where(counts, values[:, t], follows)
        advantages.append(advantage)
    stacked = torch.stack(advantages[::-1], 1) if steps else rewards
    return stacked, stacked + values


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    done: Tensor | None = None,
    truncated: Tensor | None = None,
    next_value: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask_mode: str = "carry",
) -> tuple[Tensor, Tensor]:
    """The definition with the public function's signature."""
    return forward(rewards, values, mask, done, truncated, next_value, gamma, lam, mask_mode == "carry")
