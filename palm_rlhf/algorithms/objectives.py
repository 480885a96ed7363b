"""Losses of policies and critics, each written once, per token; and how tokens are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

# Beyond it a ratio says nothing, and its exponential overflows.
MAX_LOG_RATIO = 20.0


def cleared(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is set, 0 elsewhere; no gradient elsewhere, whatever stands there."""
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_mean(x: Tensor, mask: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Sum of x where the mask is set, over `count` or the number of such places; 0 where there are none.

    `where`, not a product: NaN in a masked slot is harmless, in the gradient as well. `count` is the
    number of tokens of the whole update where x is a part of it, so that every token weighs the same.
    """
    total = cleared(x, mask).sum()
    return total / (mask.sum().clamp(min=1) if count is None else count)


def log_ratio(logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> Tensor:
    """log(policy / old policy) at real tokens, 0 elsewhere, clamped."""
    return cleared(logprob - old_logprob, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def clipped_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's -min(r A, clip(r, 1 - clip, 1 + clip_high) A) per token.

    Schulman et al., 2017, arXiv:1707.06347, equation 7.

    Args:
        log_ratio: log r.
        advantages: A, same shape.
        clip: below 1. clip_high: above 1, `clip` by default (Yu et al., 2025, arXiv:2503.14476: clip-higher).
        dual_clip: above 1; bounds the loss by -dual_clip A where A < 0 (Ye et al., 2020, arXiv:1912.09729).
    """
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    loss = torch.maximum(-ratio * advantages, -bounded * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2
) -> Tensor:
    """Half the larger of two squared errors per token, one of values within `clip` of the old ones."""
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2
