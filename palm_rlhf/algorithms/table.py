"""The table of online algorithms: a row names an estimator, an objective and what they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from palm_rlhf.algorithms import groups
from palm_rlhf.algorithms.estimators import KLKind, gae_with_kl, response_kl, returns_with_kl
from palm_rlhf.algorithms.objectives import Average, cleared, clipped_value_loss, masked_mean
from palm_rlhf.algorithms.policy import PolicyOptions, policy_objective
from palm_rlhf.algorithms.row import Algorithm, Loss, Outputs, Whole
from palm_rlhf.rollout import Rollout

# As many responses in a rollout as without groups: 64.
GROUPS = {"prompts": 8, "samples": 8}


@dataclass(frozen=True)
class PPOOptions(PolicyOptions):
    """Proximal policy optimisation with a critic."""

    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """Trace of generalised advantage estimation: 1 is Monte Carlo, 0 one step."""
    whiten: bool = True
    """Give the advantages of a batch mean 0 and variance 1."""
    value_clip: float | None = 0.2
    """How far a value may move from the one at sampling; None: anywhere."""
    value_coef: float = 0.1
    """Weight of the value loss."""


def ppo_estimator(rollout: Rollout, options: PPOOptions) -> tuple[Tensor, Tensor]:
    """GAE over scores and KL terms."""
    o = options
    return gae_with_kl(rollout, kl_coef=o.reward_kl_coef, kl=o.kl, gamma=o.gamma, lam=o.lam, whiten=o.whiten)


def ppo_objective(rollout: Rollout, outputs: Outputs, options: PPOOptions, whole: Whole) -> Loss:
    """The policy's objective and a clipped value loss, over the tokens of the whole update."""
    o, mask = options, rollout.mask
    total, metrics = policy_objective(rollout, outputs, o, whole)
    # Cleared first: where the loss of a masked slot is NaN, its derivative times 0 is NaN too.
    values = (cleared(x, mask) for x in (outputs.values, rollout.values, rollout.returns))
    value = masked_mean(clipped_value_loss(*values, clip=o.value_clip), mask, whole.tokens)
    return Loss(total + o.value_coef * value, metrics | {"value_loss": value.detach()})


@dataclass(frozen=True)
class GRPOOptions(PolicyOptions):
    """Group relative policy optimisation: scores less the group's mean, over its standard deviation."""

    kl_coef: float = 0.04
    """Weight of the KL divergence from the reference policy."""
    kl: KLKind = "k3"
    """Its estimate: k1 is unbiased, k3 never negative."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where it is charged. Only k2 has the right gradient in the loss: k1 has none on average."""
    average: Average = "sequence-mean"
    """What weighs the same: tokens, responses, or tokens over a constant length."""
    std_eps: float = groups.STD_EPS
    """Added to the standard deviation of a group."""


@dataclass(frozen=True)
class DrGRPOOptions(PolicyOptions):
    """GRPO without its biases: no standard deviation, and a constant in place of a response's length."""

    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference policy."""
    average: Average = "constant"
    """What weighs the same: tokens, responses, or tokens over a constant length."""


@dataclass(frozen=True)
class RLOOOptions(PolicyOptions):
    """REINFORCE leave-one-out: the baseline is the mean of the other responses; a response is one action."""

    ratio: Literal["token", "response"] = "response"
    """Of what the ratio is: of each token, or of whole responses."""


@dataclass(frozen=True)
class ReinforceOptions(PolicyOptions):
    """REINFORCE++: what follows each token, whitened over the batch; no critic and no groups."""

    gamma: float = 1.0
    """Discount of later rewards."""
    whiten: bool = True
    """Give the advantages of a batch mean 0 and variance 1."""


@dataclass(frozen=True)
class ReinforceBaselineOptions(ReinforceOptions):
    """REINFORCE++ with the mean of the group as baseline, whitened over the batch."""


@dataclass(frozen=True)
class MaxRLOptions(PolicyOptions):
    """Maximum likelihood: the gradient of log P(success), for scores of 0 and 1."""

    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference policy."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where it is charged. Only k2 has the right gradient in the loss: k1 has none on average."""
    average: Average = "sequence-sum"
    """What weighs the same: tokens, responses, or tokens over a constant length."""


def grouped(
    formula: Callable[[Tensor, Tensor, PolicyOptions], Tensor],
) -> Callable[[Rollout, PolicyOptions], tuple[Tensor, None]]:
    """An estimator: at every token what `formula` makes of scores less KL divergences of responses."""

    def estimator(rollout: Rollout, options: PolicyOptions) -> tuple[Tensor, None]:
        score = rollout.score
        if options.reward_kl_coef:
            score = score - options.reward_kl_coef * response_kl(rollout, options.kl)
        by_response = formula(score, rollout.group, options)
        return groups.over_tokens(by_response.to(rollout.logprob.dtype), rollout.mask), None

    return estimator


def reinforce_estimator(rollout: Rollout, options: ReinforceOptions) -> tuple[Tensor, Tensor]:
    """Sums of what follows, whitened."""
    o = options
    return returns_with_kl(rollout, kl_coef=o.reward_kl_coef, kl=o.kl, gamma=o.gamma, whiten=o.whiten)


def reinforce_baseline_estimator(rollout: Rollout, options: ReinforceOptions) -> tuple[Tensor, Tensor]:
    """The same of scores less the mean of their group."""
    return reinforce_estimator(replace(rollout, score=groups.centred(rollout.score, rollout.group)), options)


_ROWS = (
    Algorithm("ppo", PPOOptions, ppo_estimator, ppo_objective, critic=True),
    Algorithm(
        "grpo",
        GRPOOptions,
        grouped(lambda score, group, o: groups.standardised(score, group, o.std_eps)),
        policy_objective,
        samples=2,
        defaults=GROUPS,
    ),
    Algorithm(
        "dr-grpo",
        DrGRPOOptions,
        grouped(lambda score, group, o: groups.centred(score, group)),
        policy_objective,
        samples=2,
        defaults=GROUPS,
    ),
    Algorithm(
        "rloo",
        RLOOOptions,
        grouped(lambda score, group, o: groups.leave_one_out(score, group)),
        policy_objective,
        samples=2,
        defaults=GROUPS,
    ),
    Algorithm("reinforce++", ReinforceOptions, reinforce_estimator, policy_objective),
    Algorithm(
        "reinforce++-baseline",
        ReinforceBaselineOptions,
        reinforce_baseline_estimator,
        policy_objective,
        samples=2,
        defaults=GROUPS,
    ),
    Algorithm(
        "maxrl",
        MaxRLOptions,
        grouped(lambda score, group, o: groups.maximum_likelihood(score, group)),
        policy_objective,
        samples=2,
        defaults=GROUPS,
    ),
)

ALGORITHMS: Mapping[str, Algorithm] = {row.name: row for row in _ROWS}
