"""Returns of a trajectory by other formulas than gae's, on its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlhf_kernels.ops.advantage.recurrence import per_row
from rlhf_kernels.runtime.checks import matrix
from rlhf_kernels.runtime.dispatch import RUN_BY

RUN_BY.update(discounted_return="gae", lambda_return="gae")

Gae = Callable[..., tuple[Tensor, Tensor]]


def discounted(gae: Gae, rewards: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """gae of values that are all 0, with lam 1: one row of zeros, which stays in the cache."""
    nothing = rewards.new_zeros((1, rewards.shape[1])).expand(rewards.shape)
    found = gae(rewards, nothing, mask=mask, lam=1.0, **options)[0]
    return found if mask is None else found.masked_fill(~mask, 0)


def of_lambda(gae: Gae, rewards: Tensor, values: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """gae's returns: an advantage plus its value is the lambda-return."""
    found = gae(rewards, values, mask=mask, **options)[1]
    return found if mask is None else found.masked_fill(~mask, 0)


def discounted_return(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    done: Tensor | None = None,
    next_value: Tensor | None = None,
    gamma: float = 1.0,
) -> Tensor:
    """G_t = r_t + gamma * (0 if done_t else G_(t+1)), by the kernels of `gae`; differentiable.

    Args:
        rewards: [B, T], floating-point.
        mask: [B, T] boolean, True where a step is real; the return passes over the others.
        done: [B, T] boolean: the episode ends with this step.
        next_value: [B], G after the last step; None: 0.
        gamma: discount.

    Returns:
        G [B, T] in the dtype of rewards, 0 at masked steps; arithmetic is in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: as `gae`.
    """
    from rlhf_kernels.ops.advantage import gae

    matrix("discounted_return", "rewards", rewards)
    if next_value is not None:
        per_row("discounted_return", "rewards", rewards, "next_value", next_value)
    return discounted(gae, rewards, mask, done=done, next_value=next_value, gamma=gamma)


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
    """The lambda-return (Sutton and Barto, Reinforcement Learning, 2nd edition, 12.1), last step first:

        G_t = r_t + gamma * (0 if done_t else (1 - lam) * V_(t+1) + lam * G_(t+1))

    by the kernels of `gae`, whose returns these are, with the value after the last step, `next_value` [B],
    for both V and G there. Arguments and errors are those of `gae`; for truncated episodes take that.

    Returns:
        G [B, T] in the dtype of rewards, 0 at masked steps.
    """
    from rlhf_kernels.ops.advantage import gae

    if next_value is not None:
        matrix("lambda_return", "rewards", rewards)
        per_row("lambda_return", "rewards", rewards, "next_value", next_value)
    return of_lambda(gae, rewards, values, mask, done=done, next_value=next_value, gamma=gamma, lam=lam)
