"""Losses of policies and critics, each written once, per token; and how tokens are averaged."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from palm_rlhf.algorithms.row import Whole

Average = Literal["token-mean", "sequence-mean", "sequence-sum", "constant"]

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


def averaged(x: Tensor, mask: Tensor, whole: Whole, how: Average = "token-mean") -> Tensor:
    """One number from x [B, R]: what a token weighs is a choice of its own.

    - `token-mean`: every token the same (Yu et al., 2025, arXiv:2503.14476: DAPO);
    - `sequence-mean`: every response the same, so that a token of a long one weighs less (Shao et al., 2024,
      arXiv:2402.03300: GRPO);
    - `sequence-sum`: the sum over a response, averaged over responses: the policy gradient itself;
    - `constant`: that over the greatest length (Liu et al., 2025, arXiv:2503.20783: Dr. GRPO).
    """
    if how == "token-mean":
        return masked_mean(x, mask, whole.tokens)
    by_response = cleared(x, mask).sum(1)
    if how == "sequence-mean":
        by_response = by_response / mask.sum(1).clamp(min=1)
    elif how == "constant":
        by_response = by_response / whole.longest
    elif how != "sequence-sum":
        raise ValueError(
            f"the average must be token-mean, sequence-mean, sequence-sum or constant, got {how!r}"
        )
    return by_response.sum() / whole.responses


def log_ratio(logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> Tensor:
    """log(policy / old policy) at real tokens, 0 elsewhere, clamped."""
    return cleared(logprob - old_logprob, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def response_log_ratio(logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> Tensor:
    """[B, 1]: log of the ratio of whole responses, the sum over their tokens, clamped."""
    return cleared(logprob - old_logprob, mask).sum(1, keepdim=True).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


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


def simple_policy_loss(log_ratio: Tensor, advantages: Tensor, *, clip: float = 0.2) -> Tensor:
    """-r A + |A| (r - 1)^2 / (2 clip) per token: its best ratio is 1 +- clip, and it has a gradient beyond.

    Xie et al., 2024, arXiv:2401.16025, algorithm 1: Simple Policy Optimization.
    """
    ratio = log_ratio.exp()
    return advantages.abs() * (ratio - 1).square() / (2 * clip) - ratio * advantages


def entropy_shaped(advantages: Tensor, entropy: Tensor, *, scale: float, kappa: float = 2.0) -> Tensor:
    """A + min(scale H, |A| / kappa), without a gradient through H: uncertain tokens are credited with more.

    Cheng et al., 2025, arXiv:2506.14758, eq. 3; with kappa above 1 the sign of A stays.
    """
    return advantages + torch.minimum(scale * entropy.detach(), advantages.abs() / kappa)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2
) -> Tensor:
    """Half the larger of two squared errors per token, one of values within `clip` of the old ones."""
    error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns).square())
    return error / 2
