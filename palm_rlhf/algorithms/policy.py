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
from palm_rlhf.rollout import Rollout


@dataclass(frozen=True)
class KLOptions:
    """How far the policy may go from the reference."""

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

    def __post_init__(self) -> None:
        if self.kl_target is not None and not (self.kl_target > 0 and self.kl_coef > 0):
            raise ValueError(
                f"kl_target must be above 0, and kl_coef to begin with as well, got {self.kl_target} and "
                f"{self.kl_coef}"
            )

    @property
    def reward_kl_coef(self) -> float:
        """The weight in the reward."""
        return self.kl_coef if self.kl_in == "reward" else 0.0


@dataclass(frozen=True)
class PolicyOptions(KLOptions):
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
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    entropy_advantage: float = 0.0
    """Weight of the entropy that is added to advantages, at most half of them; 0: none. 0.4 is usual."""
    entropy_kappa: float = 2.0
    """One over the largest part of an advantage that entropy may add."""


KL = TypeVar("KL", bound=KLOptions)


def adapted(options: KL, rollout: Rollout) -> KL:
    """The options for the next rollout: with another kl_coef where there is a target."""
    if getattr(options, "kl_target", None) is None:
        return options
    # k1, whichever estimate is charged: what is held at its target is the divergence itself.
    coef = adapted_kl_coef(
        options.kl_coef, float(response_kl(rollout).mean()), target=options.kl_target,
        responses=len(rollout), horizon=options.kl_horizon,
    )  # fmt: skip
    return replace(options, kl_coef=coef)


def policy_objective(rollout: Rollout, outputs: Outputs, options: PolicyOptions, whole: Whole) -> Loss:
    """Policy loss, entropy bonus, and the KL divergence where it is charged in the loss."""
    o, mask = options, rollout.mask
    shift = log_ratio(outputs.logprob, rollout.logprob, mask)
    policy = _policy_loss(rollout, outputs, shift, o, whole)
    entropy = masked_mean(outputs.entropy, mask, whole.tokens)
    total = policy - o.entropy_coef * entropy
    metrics = {
        "policy_loss": policy.detach(),
        "entropy": entropy.detach(),
        **moved(rollout, outputs, o, whole),
    }
    if o.kl_in == "loss":
        both = (cleared(x, mask) for x in (outputs.logprob, rollout.reference_logprob))
        kl = averaged(kl_estimate(*both, o.kl), mask, whole, o.average)
        total = total + o.kl_coef * kl
        metrics["kl_loss"] = kl.detach()
    return Loss(total, metrics)


def _policy_loss(
    rollout: Rollout, outputs: Outputs, shift: Tensor, options: PolicyOptions, whole: Whole
) -> Tensor:
    o, mask, advantages = options, rollout.mask, cleared(rollout.advantages, rollout.mask)
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
def moved(rollout: Rollout, outputs: Outputs, options: PolicyOptions, whole: Whole) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled."""
    o, mask = options, rollout.mask
    ratio = log_ratio(outputs.logprob, rollout.logprob, mask).exp()
    outside = (ratio < 1 - o.clip) | (ratio > 1 + (o.clip if o.clip_high is None else o.clip_high))
    return {
        "clip_fraction": masked_mean(outside.to(ratio.dtype), mask, whole.tokens),
        # KL(old || new), since the tokens are the old policy's.
        "approx_kl": masked_mean(kl_estimate(rollout.logprob, outputs.logprob, "k3"), mask, whole.tokens),
    }
