"""The table of online algorithms: a row names an estimator, an objective and what they need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf.algorithms.estimators import KLKind, gae_with_kl, kl_estimate
from palm_rlhf.algorithms.objectives import (
    cleared,
    clipped_policy_loss,
    clipped_value_loss,
    log_ratio,
    masked_mean,
)
from palm_rlhf.rollout import Rollout


class Outputs(NamedTuple):
    """What the learner finds for a batch: [B, R] each, `values` where there is a critic."""

    logprob: Tensor
    entropy: Tensor
    values: Tensor | None


class Loss(NamedTuple):
    """A scalar to minimise, and detached scalars to log: sums over tokens already divided by their count."""

    total: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class PPOOptions:
    """Proximal policy optimisation with a critic."""

    kl_coef: float = 0.05
    """Weight of the KL divergence from the reference policy in the reward."""
    kl: KLKind = "k1"
    """Its estimate: k1 is unbiased, k3 never negative."""
    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """Trace of generalised advantage estimation: 1 is Monte Carlo, 0 one step."""
    whiten: bool = True
    """Give the advantages of a batch mean 0 and variance 1."""
    clip: float = 0.2
    """How far below 1 (and above) the ratio may go."""
    clip_high: float | None = None
    """How far above 1 the ratio may go, if not `clip`."""
    dual_clip: float | None = None
    """Bound on the loss of bad actions, as a factor of their advantage; 3 is usual."""
    value_clip: float | None = 0.2
    """How far a value may move from the one at sampling; None: anywhere."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""


def ppo_estimator(rollout: Rollout, options: PPOOptions) -> tuple[Tensor, Tensor]:
    """GAE over scores and KL terms."""
    o = options
    return gae_with_kl(rollout, kl_coef=o.kl_coef, kl=o.kl, gamma=o.gamma, lam=o.lam, whiten=o.whiten)


def ppo_objective(rollout: Rollout, outputs: Outputs, options: PPOOptions, count: Tensor) -> Loss:
    """Clipped policy and value losses and an entropy bonus, over the tokens of the whole update."""
    o, mask = options, rollout.mask
    shift = log_ratio(outputs.logprob, rollout.logprob, mask)
    by_token = clipped_policy_loss(
        shift, rollout.advantages, clip=o.clip, clip_high=o.clip_high, dual_clip=o.dual_clip
    )
    policy = masked_mean(by_token, mask, count)
    # Cleared first: where the loss of a masked slot is NaN, its derivative times 0 is NaN too.
    values = (cleared(x, mask) for x in (outputs.values, rollout.values, rollout.returns))
    value = masked_mean(clipped_value_loss(*values, clip=o.value_clip), mask, count)
    entropy = masked_mean(outputs.entropy, mask, count)
    with torch.no_grad():
        ratio = shift.exp()
        outside = (ratio < 1 - o.clip) | (ratio > 1 + (o.clip if o.clip_high is None else o.clip_high))
        metrics = {
            "policy_loss": policy.detach(),
            "value_loss": value.detach(),
            "entropy": entropy.detach(),
            "clip_fraction": masked_mean(outside.to(ratio.dtype), mask, count),
            # KL(old || new), since the tokens are the old policy's.
            "approx_kl": masked_mean(kl_estimate(rollout.logprob, outputs.logprob, "k3"), mask, count),
        }
    return Loss(policy + o.value_coef * value - o.entropy_coef * entropy, metrics)


@dataclass(frozen=True)
class Algorithm:
    """One row.

    Attributes:
        name: as on the command line.
        options: dataclass of its numbers.
        estimator: (rollout, options) -> advantages and returns.
        objective: (rollout, outputs, options, tokens of the whole update) -> Loss.
        critic: whether it needs values. reference: whether it needs a reference policy.
    """

    name: str
    options: type
    estimator: Callable[[Rollout, Any], tuple[Tensor, Tensor]]
    objective: Callable[[Rollout, Outputs, Any, Tensor], Loss]
    critic: bool = False
    reference: bool = True


ALGORITHMS: Mapping[str, Algorithm] = {
    "ppo": Algorithm("ppo", PPOOptions, ppo_estimator, ppo_objective, critic=True),
}
