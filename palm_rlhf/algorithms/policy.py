"""The objective that most rows share: a policy loss, an entropy bonus, the KL divergence; and its options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from palm_rlhf.algorithms.estimators import KLKind, adapted_kl_coef, kl_estimate, response_kl
from palm_rlhf.algorithms.objectives import (
    Average,
    averaged,
    cleared,
    clipped_policy_loss,
    entropy_shaped,
    log_ratio,
    masked_mean,
    response_log_ratio,
    simple_policy_loss,
)
from palm_rlhf.algorithms.row import Loss, Outputs, Whole
from palm_rlhf.checks import check_options
from palm_rlhf.rollout import Rollout


@dataclass(frozen=True)
class Regularised:
    """What holds a policy back: the reference, and its own entropy."""

    kl_coef: float = 0.05
    """Weight of the KL divergence from the reference policy."""
    kl: KLKind = "k1"
    """Its estimate: k1 is unbiased, k3 never negative."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where it is charged. Only k2 has the right gradient in the loss: k1 has none on average."""
    kl_target: float | None = None
    """Nats of a response at which to hold it: kl_coef follows it then; None: kl_coef stays."""
    kl_horizon: float = 10_000.0
    """Responses over which kl_coef follows."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.kl_target is not None and not self.kl_coef > 0:
            raise ValueError(
                f"kl_target must be above 0, and kl_coef to begin with as well, got {self.kl_target} and "
                f"{self.kl_coef}"
            )

    @property
    def reward_kl_coef(self) -> float:
        """The weight in the reward."""
        return self.kl_coef if self.kl_in == "reward" else 0.0


@dataclass(frozen=True)
class PolicyOptions(Regularised):
    """What a policy objective is made of."""

    loss: Literal["clip", "spo"] = "clip"
    """PPO's clipped loss, or the penalty of Simple Policy Optimization."""
    clip: float = 0.2
    """How far below 1 (and above) the ratio may go."""
    clip_high: float | None = None
    """How far above 1 the ratio may go, if not `clip`."""
    dual_clip: float | None = None
    """Bound on the loss of bad actions, as a factor of their advantage; 3 is usual."""
    ratio: Literal["token", "response"] = "token"
    """Of what the ratio is: of each token, or of whole responses."""
    average: Average = "token-mean"
    """What weighs the same: tokens, responses, or tokens over a constant length."""
    entropy_advantage: float = 0.0
    """Weight of the entropy that is added to advantages, at most half of them; 0: none. 0.4 is usual."""
    entropy_kappa: float = 2.0
    """One over the largest part of an advantage that entropy may add."""


Options = TypeVar("Options", bound=Regularised)


def adapted(options: Options, rollout: Rollout) -> Options:
    """The options for the next rollout: with another kl_coef where there is a target."""
    if options.kl_target is None:
        return options
    # k1, whichever estimate is charged: what is held at its target is the divergence itself.
    coef = adapted_kl_coef(
        options.kl_coef, float(response_kl(rollout).mean()), target=options.kl_target,
        responses=len(rollout), horizon=options.kl_horizon,
    )  # fmt: skip
    return replace(options, kl_coef=coef)


def policy_objective(rollout: Rollout, outputs: Outputs, options: PolicyOptions, whole: Whole) -> Loss:
    """The policy loss, regularised."""
    policy = _policy_loss(rollout, outputs, options, whole)
    return regularised(policy, rollout, outputs, options, whole, average=options.average, clip=options)


def regularised(
    policy: Tensor,
    rollout: Rollout,
    outputs: Outputs,
    options: Regularised,
    whole: Whole,
    *,
    average: Average = "token-mean",
    clip: PolicyOptions | None = None,
) -> Loss:
    """A policy's loss with entropy bonus and, where it is charged in the loss, the KL divergence."""
    o, mask = options, rollout.mask
    entropy = masked_mean(outputs.entropy, mask, whole.tokens)
    total = policy - o.entropy_coef * entropy
    metrics = {"policy_loss": policy.detach(), "entropy": entropy.detach()}
    metrics |= moved(rollout, outputs, whole, clip)
    if o.kl_in == "loss":
        both = (cleared(x, mask) for x in (outputs.logprob, rollout.reference_logprob))
        kl = averaged(kl_estimate(*both, o.kl), mask, whole, average)
        total = total + o.kl_coef * kl
        metrics["kl_loss"] = kl.detach()
    return Loss(total, metrics)


def _policy_loss(rollout: Rollout, outputs: Outputs, options: PolicyOptions, whole: Whole) -> Tensor:
    o, mask, advantages = options, rollout.mask, cleared(rollout.advantages, rollout.mask)
    shift = log_ratio(outputs.logprob, rollout.logprob, mask)
    if o.entropy_advantage:
        advantages = entropy_shaped(
            advantages, cleared(outputs.entropy, mask), scale=o.entropy_advantage, kappa=o.entropy_kappa
        )
    average = o.average
    if o.ratio == "response":
        # One number a response: the mean of its tokens' advantages, which are equal where there is no critic.
        shift = response_log_ratio(outputs.logprob, rollout.logprob, mask)
        advantages = advantages.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        mask, average = mask.any(1, keepdim=True), "sequence-sum"
    if o.loss == "spo":
        loss = simple_policy_loss(shift, advantages, clip=o.clip)
    else:
        loss = clipped_policy_loss(
            shift, advantages, clip=o.clip, clip_high=o.clip_high, dual_clip=o.dual_clip
        )
    return averaged(loss, mask, whole, average)


@torch.no_grad()
def moved(
    rollout: Rollout, outputs: Outputs, whole: Whole, clip: PolicyOptions | None = None
) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled; how much is outside a clip, where there is one."""
    # KL(old || new), since the tokens are the old policy's.
    by_token = kl_estimate(rollout.logprob, outputs.logprob, "k3")
    found = {"approx_kl": masked_mean(by_token, rollout.mask, whole.tokens)}
    if clip is not None:
        # Of what the ratio is: tokens, or responses.
        mask, ratio_of, count = rollout.mask, log_ratio, whole.tokens
        if clip.ratio == "response":
            mask, ratio_of, count = mask.any(1, keepdim=True), response_log_ratio, whole.responses
        ratio = ratio_of(outputs.logprob, rollout.logprob, rollout.mask).exp()
        high = clip.clip if clip.clip_high is None else clip.clip_high
        outside = (ratio < 1 - clip.clip) | (ratio > 1 + high)
        found["clip_fraction"] = masked_mean(outside.to(ratio.dtype), mask, count)
    return found
