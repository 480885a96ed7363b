"""The definitions of discounted_return, lambda_return and vtrace: one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def _given(
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
    real, ends, value = _given(rewards, mask, done, next_value)
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


def vtrace(
    log_ratio: Tensor,
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    done: Tensor | None = None,
    next_value: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Targets and advantages at real steps, 0 at the others."""
    real, ends, value = _given(values, mask, done, next_value)
    ends = ends & real
    target, targets, advantages = value, [], []
    for t in reversed(range(values.shape[1])):
        ratio = torch.where(real[:, t], log_ratio[:, t], 0).exp()
        reward, own = (torch.where(real[:, t], x[:, t], 0) for x in (rewards, values))
        value, target = torch.where(ends[:, t], 0, value), torch.where(ends[:, t], 0, target)
        rho, c = ratio.clamp(max=rho_clip), lam * ratio.clamp(max=c_clip)
        found = own + rho * (reward + gamma * value - own) + gamma * c * (target - value)
        advantages.append(torch.where(real[:, t], rho * (reward + gamma * target - own), 0))
        targets.append(torch.where(real[:, t], found, 0))
        target = torch.where(real[:, t], found, target)
        value = torch.where(real[:, t], own, value)
    if not targets:
        return values.clone(), values.clone()
    return torch.stack(targets[::-1], 1), torch.stack(advantages[::-1], 1)
