"""Returns of a trajectory by other formulas than gae's, on its kernels or on linear_recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.advantage.recurrence import linear_recurrence, per_row
from rlhf_kernels.runtime.checks import boolean, floating, number, positive, same

Gae = Callable[..., tuple[Tensor, Tensor]]
Recurrence = Callable[..., Tensor]


def discounted(gae: Gae, rewards: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """gae of values that are all 0, with lam 1: one row of zeros, which stays in the cache."""
    nothing = rewards.new_zeros((1, rewards.shape[1])).expand(rewards.shape)
    found = gae(rewards, nothing, mask=mask, lam=1.0, **options)[0]
    return found if mask is None else found.masked_fill(~mask, 0)


def of_lambda(gae: Gae, rewards: Tensor, values: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """gae's returns: an advantage plus its value is the lambda-return."""
    found = gae(rewards, values, mask=mask, **options)[1]
    return found if mask is None else found.masked_fill(~mask, 0)


def corrected(
    recurrence: Recurrence,
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
    """V-trace: x = v - V is a linear recurrence, which passes over masked steps by a factor of 1."""
    dtype, wide = values.dtype, torch.promote_types(values.dtype, torch.float32)
    log_ratio, rewards, values = (x.to(wide) for x in (log_ratio, rewards, values))
    last = values.new_zeros(len(values)) if next_value is None else next_value.to(wide)
    if mask is not None:
        log_ratio, rewards, values = (x.masked_fill(~mask, 0) for x in (log_ratio, rewards, values))
        held = recurrence((~mask).to(wide), values, initial=last)
    else:
        held = values
    follows = torch.cat((held[:, 1:], last[:, None]), 1)
    going = None if done is None else ~done
    if going is not None:
        follows = follows * going
    ratio = log_ratio.exp()
    rho, c = ratio.clamp(max=rho_clip), ratio.clamp(max=c_clip)
    error = rewards + gamma * follows - values
    delta, trace = rho * error, gamma * lam * c
    if going is not None:
        trace = trace * going
    if mask is not None:
        delta, trace = delta.masked_fill(~mask, 0), trace.masked_fill(~mask, 1)
    x = recurrence(trace, delta)
    x_next = torch.nn.functional.pad(x[:, 1:], (0, 1))
    if going is not None:
        x_next = x_next * going
    targets, advantages = values + x, rho * (error + gamma * x_next)
    if mask is not None:
        targets, advantages = targets.masked_fill(~mask, 0), advantages.masked_fill(~mask, 0)
    return targets.to(dtype), advantages.to(dtype)


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

    _matrix("discounted_return", "rewards", rewards)
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
        _matrix("lambda_return", "rewards", rewards)
        per_row("lambda_return", "rewards", rewards, "next_value", next_value)
    return of_lambda(gae, rewards, values, mask, done=done, next_value=next_value, gamma=gamma, lam=lam)


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
    """V-trace (Espeholt et al., 2018, arXiv:1802.01561, equation 1 and section 4.2), last step first:

        rho_t = min(rho_clip, ratio_t),  c_t = lam * min(c_clip, ratio_t)
        v_t = V_t + rho_t * (r_t + gamma * V_(t+1) - V_t) + gamma * c_t * (v_(t+1) - V_(t+1))
        A_t = rho_t * (r_t + gamma * v_(t+1) - V_t)

    Gradients reach all three inputs; IMPALA takes both results without.

    Args:
        log_ratio: [B, T], log of the learner's over the sampler's probability of each action.
        rewards, values: [B, T], of one dtype with it.
        mask: [B, T] boolean, True where a step is real; state passes over the others.
        done: [B, T] boolean: the episode ends with this step, nothing follows it.
        next_value: [B], the value after the last step; None: 0.
        gamma: discount.
        lam: decay of the trace (1 in the paper; remark 2 allows less).
        rho_clip, c_clip: at most these; rho_clip at least c_clip, as the paper assumes.

    Returns:
        targets v and advantages A, [B, T] in the dtype of values, 0 at masked steps.

    Raises:
        TypeError: an input is not floating-point, dtypes differ, a mask is not boolean, a number is none.
        ValueError: a shape or device does not fit, a clip is not positive, or rho_clip is below c_clip.
    """
    op = "vtrace"
    _matrix(op, "values", values)
    same(op, "values", values, "log_ratio", log_ratio)
    same(op, "values", values, "rewards", rewards)
    for name, flag in (("mask", mask), ("done", done)):
        if flag is not None:
            boolean(op, name, flag, values.shape, values, "the shape of values")
    if next_value is not None:
        per_row(op, "values", values, "next_value", next_value)
    number(op, "gamma", gamma)
    number(op, "lam", lam)
    positive(op, "rho_clip", rho_clip)
    positive(op, "c_clip", c_clip)
    if rho_clip < c_clip:
        raise ValueError(f"{op}(): rho_clip must be at least c_clip, got {rho_clip!r} and {c_clip!r}")
    return corrected(
        linear_recurrence, log_ratio, rewards, values, mask, done, next_value, gamma, lam, rho_clip, c_clip
    )


def _matrix(op: str, name: str, x: Tensor) -> None:
    floating(op, name, x)
    if x.dim() != 2:
        raise ValueError(
            f"{op}(): {name} must be [batch, time], got {tuple(x.shape)}. One row is {name}[None]."
        )
