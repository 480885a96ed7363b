"""What a response is worth beside others to the same prompt: baselines without a critic, each written once.

Scores are [B]; `group` [B] has the same number for responses to one prompt. Everything is computed in
float64, so that the order of the batch changes nothing beyond rounding, and given back in the scores' type.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to a standard deviation, as TRL does: see docs/algorithms.md.
STD_EPS = 1e-4


def centred(scores: Tensor, group: Tensor) -> Tensor:
    """score - mean of its group (Liu et al., 2025, arXiv:2503.20783: Dr. GRPO)."""
    x = scores.double()
    mean, _, place = _moments(x, group)
    return (x - mean[place]).to(scores.dtype)


def standardised(scores: Tensor, group: Tensor, eps: float = STD_EPS) -> Tensor:
    """(score - mean) / (std + eps) of its group, std over n - 1 (Shao et al., 2024, arXiv:2402.03300: GRPO).

    0 in a group of one, or of equals.
    """
    x = scores.double()
    mean, count, place = _moments(x, group)
    difference = x - mean[place]
    squares = torch.zeros_like(mean).index_add_(0, place, difference.square())
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    return (difference / (std + eps)[place]).to(scores.dtype)


def leave_one_out(scores: Tensor, group: Tensor) -> Tensor:
    """score - mean of the others in its group (Ahmadian et al., 2024, arXiv:2402.14740: RLOO).

    n / (n - 1) times the difference to the mean of all; 0 in a group of one.
    """
    x = scores.double()
    mean, count, place = _moments(x, group)
    factor = count / (count - 1).clamp(min=1)
    return ((x - mean[place]) * factor[place]).to(scores.dtype)


def maximum_likelihood(scores: Tensor, group: Tensor) -> Tensor:
    """(score - mean) / mean of its group (arXiv:2602.02710: MaxRL); 0 where no score of a group is above 0.

    With scores 0 and 1 the average gradient is that of the successes alone, 1/K sum of grad log p, minus a
    baseline: an estimate of the gradient of log P(success), not of P(success).

    Raises:
        ValueError: a score is negative: the mean is to be a probability of success.
    """
    x = scores.double()
    if bool((x < 0).any()):
        raise ValueError(
            f"MaxRL takes scores from 0 (failure) up to 1, got {float(x.min()):g}. "
            "Shift the reward, or use grpo or rloo."
        )
    mean, _, place = _moments(x, group)
    safe = torch.where(mean > 0, mean, 1.0)
    return ((x - mean[place]) / safe[place]).to(scores.dtype)


def over_tokens(by_response: Tensor, mask: Tensor) -> Tensor:
    """[B, R]: the same number for every real token of a response, 0 elsewhere."""
    return torch.where(mask, by_response[:, None], 0.0)


def _moments(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and size of every group, and which of them each element belongs to."""
    ids, place, count = torch.unique(group, return_inverse=True, return_counts=True)
    count = count.to(x.dtype)
    total = torch.zeros(len(ids), dtype=x.dtype, device=x.device).index_add_(0, place, x)
    return total / count, count, place
