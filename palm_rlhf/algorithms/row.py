"""What a row of the table of online algorithms is made of, and what its functions are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from palm_rlhf.rollout import Rollout


class Outputs(NamedTuple):
    """What the learner finds for a batch: [B, R] each, `values` where there is a critic.

    `value_logits` [B, R, bins] are what the values are the means of, where the critic classifies; `head`
    [B, R, K] the log-probabilities of the rollout's `head_ids`; `auxiliary` [B, R] the policy's own values.
    """

    logprob: Tensor
    entropy: Tensor
    values: Tensor | None = None
    value_logits: Tensor | None = None
    head: Tensor | None = None
    auxiliary: Tensor | None = None


class Whole(NamedTuple):
    """The update of which a batch may be a part: losses are divided by its sizes, so that parts add up."""

    tokens: Tensor | float
    responses: int
    # Tokens that a response may have at most.
    longest: int


class Loss(NamedTuple):
    """A scalar to minimise, and detached scalars to log: sums already divided by the whole update's sizes."""

    total: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Algorithm:
    """One row.

    Attributes:
        name: as on the command line.
        options: dataclass of its numbers.
        estimator: (rollout, options) -> advantages and returns, [B, R] each; returns may be None.
        objective: (rollout, outputs, options, the whole update) -> Loss.
        critic: whether it needs values. reference: whether it needs a reference policy.
        samples: responses to one prompt that it needs at least.
        head: whether it needs the `options.head` most probable tokens at every place.
        auxiliary: objective of a phase after every `options.auxiliary_every` rollouts, over
            `options.auxiliary_epochs` passes, where there is one; it has `head` and `auxiliary` outputs.
        groups: whether all responses to one prompt must be in the same part of an update.
        defaults: fields of `OnlineConfig` that begin elsewhere than usual.
    """

    name: str
    options: type
    estimator: Callable[[Rollout, Any], tuple[Tensor, Tensor | None]]
    objective: Callable[[Rollout, Outputs, Any, Whole], Loss]
    critic: bool = False
    reference: bool = True
    samples: int = 1
    groups: bool = False
    head: bool = False
    auxiliary: Callable[[Rollout, Outputs, Any, Whole], Loss] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
