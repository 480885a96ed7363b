"""The table of offline algorithms: a row names an objective on pairs and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf.algorithms.contrastive import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    log_odds,
    orpo_loss,
    rebel_loss,
    simpo_loss,
    sppo_loss,
)
from palm_rlhf.checks import check_options


class Scores(NamedTuple):
    """What is known of a batch of pairs, [B] each.

    Attributes:
        chosen, rejected: log-probabilities of the responses, summed over their tokens.
        chosen_tokens, rejected_tokens: how many those are.
        difference: by how much the chosen one is better, in units of the reward.
        reference_chosen, reference_rejected: of the same responses under the reference, where it is needed.
        divergence: an estimate of KL(policy || reference) for the whole update, where it is needed.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    difference: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    divergence: Tensor | float = 0.0

    @property
    def chosen_ratio(self) -> Tensor:
        """log pi / pi_0 of the chosen response."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log pi / pi_0 of the rejected response."""
        return self.rejected - self.reference_rejected

    @property
    def chosen_mean(self) -> Tensor:
        """Log-probability per token."""
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> Tensor:
        """Log-probability per token."""
        return self.rejected / self.rejected_tokens


class PairLoss(NamedTuple):
    """Per pair [B]: the loss, and the difference between the responses that it compares, before any scale."""

    losses: Tensor
    margin: Tensor


@dataclass(frozen=True)
class PairOptions:
    """What the options of all rows have in common."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class DPOOptions(PairOptions):
    """Direct preference optimisation: the classifier of pairs that a policy implies."""

    beta: float = 0.1
    """How strongly the reference holds."""
    smoothing: float = 0.0
    """Share of pairs that may be the wrong way round."""


@dataclass(frozen=True)
class IPOOptions(PairOptions):
    """Identity preference optimisation: a margin to reach, not to exceed."""

    tau: float = 0.1
    """How strongly the reference holds: the margin sought is 1 / (2 tau)."""
    per_token: bool = True
    """Compare ratios per token, as the authors did for their results; else of whole responses."""


@dataclass(frozen=True)
class SimPOOptions(PairOptions):
    """Simple preference optimisation: log-probabilities per token, a target margin, no reference."""

    beta: float = 2.0
    """Scale of the difference of log-probabilities per token."""
    gamma: float = 1.0
    """Margin to reach, on that scale."""


@dataclass(frozen=True)
class REBELOptions(PairOptions):
    """Regression on differences of rewards; every pair needs its margin."""

    eta: float = 1.0
    """Nats of a ratio for a reward of 1: larger goes further from the reference."""


@dataclass(frozen=True)
class SPPOOptions(PairOptions):
    """Self-play preference optimisation: ratios regressed on the probability to win."""

    eta: float = 10.0
    """Nats of a ratio between a sure win and a sure loss; 1000 in the paper."""
    soft: bool = False
    """Take that probability from the pairs' margins, sigmoid(margin); else it is 1."""


@dataclass(frozen=True)
class ORPOOptions(PairOptions):
    """Odds ratio preference optimisation: imitation of the chosen and a ratio of odds, no reference."""

    weight: float = 0.1
    """Of the ratio of odds beside imitation."""


@dataclass(frozen=True)
class KTOOptions(PairOptions):
    """Kahneman-Tversky optimisation: each response alone is desirable or not."""

    beta: float = 0.1
    """How strongly the reference holds."""
    desirable: float = 1.0
    """Weight of chosen responses."""
    undesirable: float = 1.0
    """Weight of rejected responses."""


def _dpo(s: Scores, o: DPOOptions) -> PairLoss:
    margin = s.chosen_ratio - s.rejected_ratio
    return PairLoss(dpo_loss(margin, beta=o.beta, smoothing=o.smoothing), margin)


def _ipo(s: Scores, o: IPOOptions) -> PairLoss:
    chosen, rejected = s.chosen_ratio, s.rejected_ratio
    if o.per_token:
        chosen, rejected = chosen / s.chosen_tokens, rejected / s.rejected_tokens
    return PairLoss(ipo_loss(chosen - rejected, tau=o.tau), chosen - rejected)


def _simpo(s: Scores, o: SimPOOptions) -> PairLoss:
    loss = simpo_loss(s.chosen_mean, s.rejected_mean, beta=o.beta, gamma=o.gamma)
    return PairLoss(loss, s.chosen_mean - s.rejected_mean)


def _rebel(s: Scores, o: REBELOptions) -> PairLoss:
    margin = s.chosen_ratio - s.rejected_ratio
    return PairLoss(rebel_loss(margin, s.difference, eta=o.eta), margin)


def _sppo(s: Scores, o: SPPOOptions) -> PairLoss:
    win = torch.sigmoid(s.difference) if o.soft else 1.0
    return PairLoss(
        sppo_loss(s.chosen_ratio, s.rejected_ratio, win, eta=o.eta), s.chosen_ratio - s.rejected_ratio
    )


def _orpo(s: Scores, o: ORPOOptions) -> PairLoss:
    loss = orpo_loss(s.chosen_mean, s.rejected_mean, weight=o.weight)
    return PairLoss(loss, log_odds(s.chosen_mean) - log_odds(s.rejected_mean))


def _kto(s: Scores, o: KTOOptions) -> PairLoss:
    """The mean over both responses of a pair, so that the batch is the mean over responses."""
    chosen = kto_loss(s.chosen_ratio, s.divergence, desirable=True, beta=o.beta)
    rejected = kto_loss(s.rejected_ratio, s.divergence, desirable=False, beta=o.beta)
    loss = (o.desirable * chosen + o.undesirable * rejected) / 2
    return PairLoss(loss, s.chosen_ratio - s.rejected_ratio)


@dataclass(frozen=True)
class PairAlgorithm:
    """One row.

    Attributes:
        name: as on the command line.
        options: dataclass of its numbers.
        objective: (scores, options) -> loss and margin of each pair.
        reference: whether it needs log-probabilities under the reference.
        divergence: whether it needs KL(policy || reference), from responses to other prompts.
        margins: whether with these options pairs must say by how much the chosen response is better.
    """

    name: str
    options: type
    objective: Callable[[Scores, Any], PairLoss]
    reference: bool = True
    divergence: bool = False
    margins: Callable[[Any], bool] = lambda options: False


_ROWS = (
    PairAlgorithm("dpo", DPOOptions, _dpo),
    PairAlgorithm("simpo", SimPOOptions, _simpo, reference=False),
    PairAlgorithm("rebel", REBELOptions, _rebel, margins=lambda options: True),
    PairAlgorithm("sppo", SPPOOptions, _sppo, margins=lambda options: options.soft),
    PairAlgorithm("ipo", IPOOptions, _ipo),
    PairAlgorithm("orpo", ORPOOptions, _orpo, reference=False),
    PairAlgorithm("kto", KTOOptions, _kto, divergence=True),
)

PAIR_ALGORITHMS: Mapping[str, PairAlgorithm] = {row.name: row for row in _ROWS}
