"""Losses of a policy on pairs of responses, each written once, per pair or per response [B].

Arguments are log-probabilities of whole responses, summed over tokens unless their name says mean, and
log-ratios of the policy to the reference, log pi(y) - log pi_0(y). `margin` is the ratio of the chosen
response less that of the rejected one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(margin: Tensor, *, beta: float = 0.1, smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta margin); with `smoothing` that share of the pairs is taken to be the wrong way round.

    Rafailov et al., 2023, arXiv:2305.18290, eq. 7; smoothed Mitchell, 2023, "A note on DPO with noisy
    preferences", eq. 3.
    """
    loss = -F.logsigmoid(beta * margin)
    return loss if not smoothing else (1 - smoothing) * loss - smoothing * F.logsigmoid(-beta * margin)


def ipo_loss(margin: Tensor, *, tau: float = 0.1) -> Tensor:
    """(margin - 1 / (2 tau))^2: a margin to reach, not to exceed.

    Azar et al., 2023, arXiv:2310.12036, eq. 17.
    """
    return (margin - 1 / (2 * tau)).square()


def simpo_loss(
    chosen_mean: Tensor, rejected_mean: Tensor, *, beta: float = 2.0, gamma: float = 1.0
) -> Tensor:
    """-log sigmoid(beta (chosen - rejected) - gamma) of log-probabilities per token; there is no reference.

    Meng et al., 2024, arXiv:2405.14734, eq. 6.
    """
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def rebel_loss(margin: Tensor, difference: Tensor, *, eta: float = 1.0) -> Tensor:
    """(margin / eta - difference)^2: the policy's ratio regressed on a difference of rewards.

    Gao et al., 2024, arXiv:2404.16767, algorithm 1. Their code has (margin - eta difference)^2, which is
    eta^2 times this, with the same optimum.
    """
    return (margin / eta - difference).square()


def sppo_loss(
    chosen_ratio: Tensor, rejected_ratio: Tensor, win: Tensor | float = 1.0, *, eta: float = 1.0
) -> Tensor:
    """(chosen - eta (win - 1/2))^2 + (rejected + eta (win - 1/2))^2.

    Wu et al., 2024, arXiv:2405.00675, eq. 4.7, over both responses of a pair; `win` is the probability that
    the chosen one is preferred.
    """
    target = eta * (win - 0.5)
    return (chosen_ratio - target).square() + (rejected_ratio + target).square()


def log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) for log p = mean < 0, exact where p is near 0 and where it is near 1."""
    mean = mean.clamp(max=-1e-7)  # a certain response has no odds
    p_is_large = mean > -0.6931471805599453
    # Each branch where it is exact, and out of the other's way: its gradient there must be finite.
    large = torch.where(p_is_large, mean, -0.5)
    small = torch.where(p_is_large, -1.0, mean)
    rest = torch.where(p_is_large, torch.log(-torch.expm1(large)), torch.log1p(-torch.exp(small)))
    return mean - rest


def orpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, *, weight: float = 0.1) -> Tensor:
    """-chosen - weight log sigmoid(log odds(chosen) - log odds(rejected)) of log-probabilities per token.

    Hong et al., 2024, arXiv:2403.07691, eq. 6: imitation of the chosen response and a ratio of odds; there is
    no reference.
    """
    ratio = F.logsigmoid(log_odds(chosen_mean) - log_odds(rejected_mean))
    return -chosen_mean - weight * ratio


def kto_loss(ratio: Tensor, divergence: Tensor | float, *, desirable: bool, beta: float = 0.1) -> Tensor:
    """1 - sigmoid(+-beta (ratio - divergence)) per response: of what is desirable +, of what is not -.

    Ethayarajh et al., 2024, arXiv:2402.01306, eq. 8. `divergence` is the reference point, an estimate of
    KL(policy || reference) that is at least 0 and has no gradient.
    """
    sign = 1.0 if desirable else -1.0
    return 1 - torch.sigmoid(sign * beta * (ratio - divergence))
