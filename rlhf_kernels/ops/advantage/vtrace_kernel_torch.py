"""vtrace in plain PyTorch: x = v - V is a linear recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.ops.advantage import recurrence, recurrence_kernel_torch
from rlhf_kernels.runtime.library import recomputed

DIFFERENTIABLE = True  # forward

Recurrence = Callable[..., Tensor]


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
    if done is not None:
        follows = follows.masked_fill(done, 0)
    # Beyond both clips, and finite: the gradient of an exp that overflows would be 0 * inf.
    ratio = log_ratio.clamp(max=math.log(rho_clip) + 1).exp()
    rho, c = ratio.clamp(max=rho_clip), ratio.clamp(max=c_clip)
    error = rewards + gamma * follows - values
    delta, trace = rho * error, gamma * lam * c
    if done is not None:
        trace = trace.masked_fill(done, 0)
    if mask is not None:
        delta, trace = delta.masked_fill(~mask, 0), trace.masked_fill(~mask, 1)
    x = recurrence(trace, delta)
    x_next = torch.nn.functional.pad(x[:, 1:], (0, 1))
    if done is not None:
        x_next = x_next.masked_fill(done, 0)
    targets, advantages = values + x, rho * (error + gamma * x_next)
    if mask is not None:
        targets, advantages = targets.masked_fill(~mask, 0), advantages.masked_fill(~mask, 0)
    return targets.to(dtype), advantages.to(dtype)


forward = partial(corrected, recurrence_kernel_torch.linear_recurrence)
# For kernels that have a forward alone: on the kernels of linear_recurrence, through which autograd goes.
differentiable = partial(corrected, recurrence.linear_recurrence)


def backward(grad_targets: Tensor, grad_advantages: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of log_ratio, rewards, values and next_value (empty where it is None), where the forward has
    run as an opaque operator."""
    found: Sequence[Any] = recomputed(differentiable, args, (grad_targets, grad_advantages))
    return tuple(args[0].new_empty(0) if found[i] is None else found[i].contiguous() for i in (0, 1, 2, 5))


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
    """The plain form with the public function's signature."""
    return forward(log_ratio, rewards, values, mask, done, next_value, gamma, lam, rho_clip, c_clip)
