"""The definitions of discounted_return and lambda_return: one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def given(
    like: Tensor, mask: Tensor | None, done: Tensor | None, next_value: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which steps are real, which end an episode, what follows the last."""
    none = torch.zeros_like(like, dtype=torch.bool)
    last = like.new_zeros(len(like)) if next_value is None else next_value
    return ~none if mask is None else mask, none if done is None else done, last


def lambda_return(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    done: Tensor | None = None,
    next_value: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Tensor:
    """G_t = r_t + gamma * ((1 - lam) * V_(t+1) + lam * G_(t+1)) at real steps, 0 at the others."""
    real, ends, value = given(rewards, mask, done, next_value)
    g, found = value, []
    for t in reversed(range(rewards.shape[1])):
        step = rewards[:, t] + gamma * torch.where(ends[:, t], 0, (1 - lam) * value + lam * g)
        g = torch.where(real[:, t], step, g)
        value = torch.where(real[:, t], values[:, t], value)
        found.append(torch.where(real[:, t], step, 0))
    return torch.stack(found[::-1], 1) if found else rewards.clone()


def discounted_return(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    done: Tensor | None = None,
    next_value: Tensor | None = None,
    gamma: float = 1.0,
) -> Tensor:
    """The same with lam 1, which asks for no values."""
    options = {"mask": mask, "done": done, "next_value": next_value, "gamma": gamma, "lam": 1.0}
    return lambda_return(rewards, torch.zeros_like(rewards), **options)
