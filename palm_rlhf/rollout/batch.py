"""A batch of responses on its way from the sampler to the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from palm_rlhf.generation import Generation


@dataclass(frozen=True)
class Rollout:
    """Responses with their rewards. B responses of at most R tokens; what is not needed is None.

    Attributes:
        generation: tokens, mask, and the log-probability recorded while sampling: the ratio is taken to it.
        temperature: that of the sampler, by which the learner divides its logits as well.
        score: [B], one number for each response.
        reference_logprob: [B, R], of the same tokens under the reference policy.
        values: [B, R], the critic's, before each token.
        advantages, returns: [B, R], from the estimator.
        group: [B] int64, the same number for responses to one prompt.
        head_ids, head_logprob: [B, R, K], the most probable tokens at each place before the update.
    """

    generation: Generation
    temperature: float
    score: Tensor
    reference_logprob: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    group: Tensor | None = None
    head_ids: Tensor | None = None
    head_logprob: Tensor | None = None

    @property
    def logprob(self) -> Tensor:
        """[B, R], recorded while sampling."""
        return self.generation.logprob

    @property
    def mask(self) -> Tensor:
        """[B, R] boolean, True where a token of the response is real."""
        return self.generation.response_mask

    def __len__(self) -> int:
        return len(self.score)

    def rows(self, index: Tensor | slice) -> Rollout:
        """Some of the responses."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value[index] for name, value in found.items() if isinstance(value, Tensor)}
        return replace(self, generation=self.generation.rows(index), **tensors)

    def trimmed(self) -> Rollout:
        """Without the columns that are padding in every row, on either side."""
        g = self.generation
        first, length = (
            int(g.mask.any(0).to(torch.uint8).argmax()),
            int(self.mask.sum(1).max()) if len(self) else 0,
        )
        first = min(first, g.prompt_width - 1)
        end = g.prompt_width + length
        cut = replace(
            g, tokens=g.tokens[:, first:end], mask=g.mask[:, first:end], prompt_width=g.prompt_width - first,
            logprob=g.logprob[:, :length], log_mass=g.log_mass[:, :length],
        )  # fmt: skip
        names = ("reference_logprob", "values", "advantages", "returns", "head_ids", "head_logprob")
        by_token = {name: x[:, :length] for name in names if (x := getattr(self, name)) is not None}
        return replace(self, generation=cut, **by_token)

    def to(self, device: str | torch.device) -> Rollout:
        """The same on another device."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)}
        return replace(self, generation=self.generation.to(device), **tensors)

    def state(self) -> dict[str, Any]:
        """What a checkpoint can hold of it: numbers and tensors."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        g = self.generation
        return found | {"generation": {f.name: getattr(g, f.name) for f in fields(g)}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rollout:
        """The rollout of such a state."""
        return cls(**(state | {"generation": Generation(**state["generation"])}))

    def minibatches(
        self, size: int, generator: torch.Generator | None = None, *, groups: bool = False
    ) -> Iterator[Rollout]:
        """All responses once, in a fresh order, `size` at a time; with `groups` those of a group together.

        A minibatch then holds whole groups where `size` is a multiple of their size.
        """
        order = shuffled(len(self), generator, self.group.cpu() if groups else None)
        for index in order.split(size):
            yield self.rows(index.to(self.score.device))

    def micro_batches(self, size: int | None) -> Iterator[Rollout]:
        """All responses once, in order, at most `size` at a time, without padding that they do not need."""
        for start in range(0, len(self), size or len(self)):
            yield self.rows(slice(start, start + (size or len(self)))).trimmed()


def shuffled(count: int, generator: torch.Generator | None, group: Tensor | None = None) -> Tensor:
    """[count] int64: rows in a fresh order; those of a `group` [count] stay together where it is given."""
    order = torch.randperm(count, generator=generator)
    if group is None:
        return order
    # By the place that the first of its group drew.
    ids, place = torch.unique(group, return_inverse=True)
    first = torch.full((len(ids),), count)
    first.scatter_reduce_(0, place[order], torch.arange(count), "amin")
    return first[place].argsort(stable=True)
