"""The definition of vtrace: one step after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_kernels.ops.advantage.returns_reference import given

DIFFERENTIABLE = True


def forward(
    log_ratio: Tensor,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    done: Tensor | None,
    next_value: Tensor | None,
    gamma: float,
    lam: float,
    rho_clip: float,
    c_clip: float,
) -> tuple[Tensor, Tensor]:
    """Targets and advantages at real steps, 0 at the others."""
    real, ends, value = given(values, mask, done, next_value)
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
    """The definition with the public function's signature."""
    return forward(log_ratio, rewards, values, mask, done, next_value, gamma, lam, rho_clip, c_clip)
