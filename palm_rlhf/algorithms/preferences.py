"""Losses of reward models, each written once, per example: pairs, labels in bins, labels as numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None = None) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) per pair: how surprising it is that `chosen` won.

    Bradley and Terry, 1952, "Rank analysis of incomplete block designs"; as a loss Ouyang et al., 2022,
    arXiv:2203.02155, eq. 1; with a margin Touvron et al., 2023, arXiv:2307.09288, eq. 2.

    Args:
        chosen, rejected: rewards of the same shape; half precision is computed in float32.
        margin: by how much `chosen` should win, a number or one for each pair.
    """
    difference = _full(chosen) - _full(rejected)
    return -F.logsigmoid(difference if margin is None else difference - margin)


def centring_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(chosen + rejected)^2 per pair: Bradley-Terry leaves open where rewards lie, and this puts them at 0.

    Eisenstein et al., 2023, arXiv:2312.09244, as a regulariser; 0.01 is their weight.
    """
    return (_full(chosen) + _full(rejected)).square()


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 per pair where `chosen` is above, 0 where below, 1/2 where equal: a constant reward gets 1/2."""
    return 0.5 + 0.5 * torch.sign(_full(chosen) - _full(rejected))


def binned_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per example of logits [B, bins] with the index of the right bin [B], int64.

    Farebrother et al., 2024, arXiv:2403.03950, on classes in place of regression.
    """
    return F.cross_entropy(_full(logits), labels, reduction="none")


def regression_loss(predictions: Tensor, labels: Tensor) -> Tensor:
    """Squared error per example of predictions [B] (Wang et al., 2024, arXiv:2406.08673, section 4.1)."""
    predictions = _full(predictions)
    return (predictions - labels.to(predictions.dtype)).square()


def implicit_rewards(logprob: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """beta (log pi - log pi_ref) of every token: what a model of outcomes says each step was worth.

    Yuan et al., 2024, arXiv:2412.01981, proposition 3.1.
    """
    return beta * (_full(logprob) - _full(reference))


def outcome_loss(rewards: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of sigmoid(sum of its rewards) with a response's label [B], 1 for right and 0 for wrong.

    Yuan et al., 2024, arXiv:2412.01981, eq. 5: of the sum, since only the outcome has a label.
    """
    total = rewards.sum(-1)
    return F.binary_cross_entropy_with_logits(total, labels.to(total.dtype), reduction="none")


def expected_value(logits: Tensor, values: Tensor | None = None) -> Tensor:
    """sum_i softmax(logits)_i values_i of logits [..., bins]; the values of bins are 0, 1, 2, ... by default.

    Bellemare et al., 2017, arXiv:1707.06887: the mean of a categorical distribution over a fixed support.
    """
    probabilities = _full(logits).softmax(-1)
    if values is None:
        values = torch.arange(logits.shape[-1], device=logits.device)
    return probabilities @ values.to(probabilities.dtype)


def _full(x: Tensor) -> Tensor:
    """float32 of what is less."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
