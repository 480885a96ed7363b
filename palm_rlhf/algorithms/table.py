"""The table of online algorithms: a row names an estimator, an objective and what they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from palm_rlhf.algorithms import groups
from palm_rlhf.algorithms.critics import SIGMA_TO_BIN, hl_gauss_loss, hl_gauss_target
from palm_rlhf.algorithms.estimators import KLKind, gae_with_kl, response_kl, returns_with_kl
from palm_rlhf.algorithms.matching import (
    cloning_divergence,
    score_centred_loss,
    target_policy_loss,
    trajectory_balance_loss,
)
from palm_rlhf.algorithms.objectives import (
    Average,
    averaged,
    cleared,
    clipped_value_loss,
    masked_mean,
    response_log_ratio,
)
from palm_rlhf.algorithms.policy import PolicyOptions, Regularised, policy_objective, regularised
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
    """How far a value may move from the one at sampling; None: anywhere. Bins have no such bound."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    critic_bins: int = 0
    """Let the critic classify returns into so many bins (HL-Gauss); 0: one number and squared errors."""
    critic_low: float = -5.0
    """Lower end of those bins."""
    critic_high: float = 5.0
    """Upper end of those bins."""
    critic_sigma: float = SIGMA_TO_BIN
    """Standard deviation of a return over the width of a bin."""


def ppo_estimator(rollout: Rollout, options: PPOOptions) -> tuple[Tensor, Tensor]:
    """GAE over scores and KL terms."""
    o = options
    return gae_with_kl(rollout, kl_coef=o.reward_kl_coef, kl=o.kl, gamma=o.gamma, lam=o.lam, whiten=o.whiten)


def ppo_objective(rollout: Rollout, outputs: Outputs, options: PPOOptions, whole: Whole) -> Loss:
    """The policy's objective and a value loss, over the tokens of the whole update."""
    total, metrics = policy_objective(rollout, outputs, options, whole)
    value = _value_loss(rollout, outputs, options, whole, clip=options.value_clip)
    return Loss(total + options.value_coef * value, metrics | {"value_loss": value.detach()})


def _value_loss(
    rollout: Rollout, outputs: Outputs, options: PPOOptions, whole: Whole, clip: float | None
) -> Tensor:
    """The critic's, by squared errors or by bins, averaged over tokens."""
    o, mask = options, rollout.mask
    # Cleared first: where the loss of a masked slot is NaN, its derivative times 0 is NaN too.
    values, old, returns = (cleared(x, mask) for x in (outputs.values, rollout.values, rollout.returns))
    if outputs.value_logits is None:
        by_token = clipped_value_loss(values, old, returns, clip=clip)
    else:
        logits = cleared(outputs.value_logits, mask[..., None])
        bins = (o.critic_low, o.critic_high, logits.shape[-1])
        by_token = hl_gauss_loss(logits, hl_gauss_target(returns, *bins, sigma_to_bin=o.critic_sigma))
    return masked_mean(by_token, mask, whole.tokens)


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
class SPOOptions(GRPOOptions):
    """Simple Policy Optimization: GRPO's advantages, a penalty on the ratio in place of the clip."""

    loss: Literal["clip", "spo"] = "spo"
    """PPO's clipped loss, or the penalty of Simple Policy Optimization."""


@dataclass(frozen=True)
class EntropyOptions(GRPOOptions):
    """GRPO with entropy-shaped advantages: uncertain tokens are credited with more."""

    entropy_advantage: float = 0.4
    """Weight of the entropy that is added to advantages; 0.4 for GRPO, 0.1 for PPO in the paper."""


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
    """Where it is charged: in the loss alone. Only k2 has the right gradient there, k1 none on average."""
    average: Average = "sequence-sum"
    """What weighs the same: tokens, responses, or tokens over a constant length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_kl_coef:
            raise ValueError(
                "maxrl reads scores from 0 up to 1 as probabilities of success, which a KL divergence in the "
                f"reward (kl_coef {self.kl_coef:g}) makes negative: charge it with kl_in='loss'"
            )


@dataclass(frozen=True)
class CenteringOptions(Regularised):
    """Score centering: REINFORCE whose score has mean 0 under the sampler, with GRPO's advantages."""

    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference policy."""
    head: int = 32
    """Most probable tokens over which the mean is taken; the rest counts as a whole."""
    truncation: float | None = None
    """Weigh by the ratio of learner to sampler, up to this bound; None: do not weigh."""
    average: Average = "token-mean"
    """What weighs the same: tokens, responses, or tokens over a constant length."""


@dataclass(frozen=True)
class PPGOptions(PPOOptions):
    """Phasic policy gradient: PPO, and now and then a phase that teaches the policy's network the values."""

    auxiliary_every: int = 8
    """Rollouts between two auxiliary phases, all of which it sees again."""
    auxiliary_epochs: int = 2
    """Passes over them."""
    clone_coef: float = 1.0
    """Weight of the KL divergence from the policy before the phase."""
    head: int = 32
    """Most probable tokens over which that divergence is taken; the rest counts as a whole."""


@dataclass(frozen=True)
class TPOOptions(Regularised):
    """Target policy optimization: cross-entropy with a better distribution over a group's responses."""

    kl_coef: float = 0.0
    """Weight of the KL divergence from the reference policy."""
    eta: float = 1.0
    """Temperature of the target: smaller goes further in one rollout."""


@dataclass(frozen=True)
class FlowRLOptions(Regularised):
    """FlowRL: responses in proportion to exp(reward), by a learned partition function of the prompt."""

    kl_coef: float = 0.0
    """Weight of a KL divergence besides: the loss itself refers to the reference."""
    beta: float = 15.0
    """Nats per token for a standard deviation of the scores."""
    clip: float = 0.2
    """How far from 1 the weight of a response, its ratio, may go."""


def grouped(
    formula: Callable[[Tensor, Tensor, Regularised], Tensor],
) -> Callable[[Rollout, Regularised], tuple[Tensor, None]]:
    """An estimator: at every token what `formula` makes of scores less KL divergences of responses."""

    def estimator(rollout: Rollout, options: Regularised) -> tuple[Tensor, None]:
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


def standardised_scores(score: Tensor, group: Tensor, options: Regularised) -> Tensor:
    """GRPO's advantages."""
    return groups.standardised(score, group, getattr(options, "std_eps", groups.STD_EPS))


def centering_objective(rollout: Rollout, outputs: Outputs, options: CenteringOptions, whole: Whole) -> Loss:
    """The centred score of every token that was drawn."""
    mask = rollout.mask
    drawn = (cleared(x, mask) for x in (outputs.logprob, rollout.logprob))
    heads = (cleared(x, mask[..., None]) for x in (outputs.head, rollout.head_logprob))
    advantages = cleared(rollout.advantages, mask)
    by_token = score_centred_loss(*drawn, *heads, advantages, truncation=options.truncation)
    policy = averaged(by_token, mask, whole, options.average)
    return regularised(policy, rollout, outputs, options, whole, average=options.average)


def ppg_auxiliary(rollout: Rollout, outputs: Outputs, options: PPGOptions, whole: Whole) -> Loss:
    """Values from the policy's own network, the policy held where it is, and the critic once more.

    Cobbe et al., 2020, arXiv:2009.04416, algorithm 1.
    """
    mask, returns = rollout.mask, cleared(rollout.returns, rollout.mask)
    heads = (cleared(x, mask[..., None]) for x in (outputs.head, rollout.head_logprob))
    own = masked_mean((cleared(outputs.auxiliary, mask) - returns).square() / 2, mask, whole.tokens)
    # The values at sampling are too old to hold the new ones near them.
    value = _value_loss(rollout, outputs, options, whole, clip=None)
    clone = masked_mean(cloning_divergence(*heads), mask, whole.tokens)
    metrics = {"auxiliary_value_loss": own.detach(), "clone_kl": clone.detach()}
    return Loss(own + options.clone_coef * clone + options.value_coef * value, metrics)


def tpo_objective(rollout: Rollout, outputs: Outputs, options: TPOOptions, whole: Whole) -> Loss:
    """Cross-entropy of every group with its target, averaged over groups."""
    mask = rollout.mask
    now = cleared(outputs.logprob, mask).sum(1)
    # In float64: in float32 the padding would change how the sum is rounded, and its exponential by 1e-6.
    then = cleared(rollout.logprob, mask).sum(1, dtype=torch.float64)
    # An advantage is the same at every token, and a response has a first one.
    by_response = target_policy_loss(now, then, rollout.advantages[:, 0], rollout.group, eta=options.eta)
    size = torch.unique(rollout.group, return_counts=True)[1].to(by_response.dtype).mean()
    policy = by_response.sum() * size / whole.responses
    return regularised(policy, rollout, outputs, options, whole)


def flowrl_objective(rollout: Rollout, outputs: Outputs, options: FlowRLOptions, whole: Whole) -> Loss:
    """Trajectory balance; log Z is the value before the first token, which has seen the prompt alone."""
    o, mask = options, rollout.mask
    length = mask.sum(1).clamp(min=1)
    mean, reference = (cleared(x, mask).sum(1) / length for x in (outputs.logprob, rollout.reference_logprob))
    loss = trajectory_balance_loss(
        outputs.values[:, 0], mean, reference, rollout.advantages[:, 0], beta=o.beta
    )
    ratio = response_log_ratio(outputs.logprob, rollout.logprob, mask).squeeze(1).detach().exp()
    policy = (ratio.clamp(1 - o.clip, 1 + o.clip) * loss).sum() / whole.responses
    return regularised(policy, rollout, outputs, o, whole)


_ROWS = (
    Algorithm("ppo", PPOOptions, ppo_estimator, ppo_objective, critic=True),
    Algorithm(
        "grpo",
        GRPOOptions,
        grouped(standardised_scores),
        policy_objective,
        samples=2,
        defaults=GROUPS,
    ),
    Algorithm("spo", SPOOptions, grouped(standardised_scores), policy_objective, samples=2, defaults=GROUPS),
    Algorithm(
        "grpo-entropy",
        EntropyOptions,
        grouped(standardised_scores),
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
    Algorithm(
        "score-centering",
        CenteringOptions,
        grouped(standardised_scores),
        centering_objective,
        samples=2,
        head=True,
        defaults=GROUPS,
    ),
    Algorithm("ppg", PPGOptions, ppo_estimator, ppo_objective, critic=True, auxiliary=ppg_auxiliary),
    Algorithm(
        "tpo",
        TPOOptions,
        grouped(standardised_scores),
        tpo_objective,
        samples=2,
        groups=True,
        defaults=GROUPS,
    ),
    Algorithm(
        "flowrl",
        FlowRLOptions,
        grouped(standardised_scores),
        flowrl_objective,
        critic=True,
        samples=2,
        defaults=GROUPS,
    ),
)

ALGORITHMS: Mapping[str, Algorithm] = {row.name: row for row in _ROWS}
