"""What every trainer has: its data in turn, optimizers, sources of randomness, and the state of them all."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from palm_rlhf.trainers.ranks import ranks

Precision = Literal["float32", "bf16"]


class Order:
    """Which examples come next: each once before any comes again, in a fresh order each time."""

    def __init__(self, count: int, generator: torch.Generator, *, across: bool) -> None:
        """Of `count` examples. `across`: a batch may reach into the next pass; else the last is smaller."""
        self.count, self.generator, self.across = count, generator, across
        self.rest = torch.empty(0, dtype=torch.int64)

    def next(self, size: int) -> list[int]:
        """The indices of the next batch."""
        while len(self.rest) < (size if self.across else 1):
            self.rest = torch.cat([self.rest, torch.randperm(self.count, generator=self.generator)])
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken.tolist()


class Trainer:
    """A `loop.Learner` but for `step` and `modules`."""

    def __init__(
        self,
        name: str,
        order: Order,
        optimizers: Mapping[str, torch.optim.Optimizer],
        generators: Mapping[str, torch.Generator],
        *,
        batch: int,
        max_grad_norm: float | None,
        precision: Precision = "float32",
    ) -> None:
        """
        Args:
            name: of the learner. order: of its data.
            optimizers: by the names of what they update.
            generators: all sources of randomness, the order's among them.
            batch: examples that are taken at a time.
            max_grad_norm: what the gradients of each optimizer are clipped to; None: they are not.
            precision: of products in forward and backward passes. Weights, their gradients, optimizers,
                log-probabilities and losses are as without it.

        Raises:
            ValueError: the launch asks for another precision.
        """
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if asked not in ("no", precision):
            raise ValueError(
                f"accelerate launch asks for mixed precision {asked}, and the run for {precision}. "
                "Give --precision bf16, or launch with --mixed_precision no or bf16."
            )
        self._lower = precision == "bf16"
        self.name, self._order, self._batch_size = name, order, batch
        self._optimizers, self._generators = dict(optimizers), dict(generators)
        self._max_grad_norm, self.ranks = max_grad_norm, ranks()
        for optimizer in self._optimizers.values() if self.ranks.sharded else ():
            for group in optimizer.param_groups:
                group["foreach"] = False  # which takes no shards beside whole parameters

    def autocast(self) -> torch.autocast:
        """In which forward passes run."""
        kind = next(iter(self._optimizers.values())).param_groups[0]["params"][0].device.type
        return torch.autocast(kind, torch.bfloat16, enabled=self._lower)

    def rates(self, index: int) -> Mapping[str, float]:
        """The learning rate of each optimizer in the step with this index."""
        raise NotImplementedError

    def _set_rates(self, index: int) -> None:
        rates = self.rates(index)
        for name, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]

    def _next_indices(self) -> list[int]:
        return self._order.next(self._batch_size)

    def _apply(self, index: int, loss: float = 0.0, without: Iterable[str] = ()) -> dict[str, float]:
        """Updates with the gradients of all processes, and clears them; their norms before clipping.

        Args:
            index: of the step.
            loss: what the gradients are of, where it is to be checked as well.
            without: optimizers that forget their gradients and update nothing.

        Raises:
            ValueError: the loss or a norm is not finite; nothing is updated.
        """
        self._add_gradients()
        limit = math.inf if self._max_grad_norm is None else self._max_grad_norm
        norms = {
            name: self.ranks.clipped(_parameters(optimizer), limit)
            for name, optimizer in self._optimizers.items()
        }
        odd = {"loss": loss, **{f"norm of the {name}'s gradients": norm for name, norm in norms.items()}}
        for what, value in odd.items():
            if not math.isfinite(value):
                rate = max(self.rates(index).values())
                raise ValueError(
                    f"the {what} is {value} at step {index + 1}. Lower the learning rate ({rate:g})."
                )
        for name, optimizer in self._optimizers.items():
            if name not in without:
                optimizer.step()
            optimizer.zero_grad()
        return norms

    def _add_gradients(self) -> None:
        """Those of all processes: each has those of its share of an update's sum."""
        if self.ranks.count == 1:
            return
        learned = list(
            {id(p): p for optimizer in self._optimizers.values() for p in _parameters(optimizer)}.values()
        )
        # What has a gradient nowhere keeps none: an optimizer would move it by its momentum.
        there = torch.tensor([float(p.grad is not None) for p in learned], device=learned[0].device)
        self.ranks.sum([there])
        found = [p for p, count in zip(learned, there.tolist()) if count]
        for parameter in found:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.sum([parameter.grad for parameter in found])

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By the names of what they update."""
        return self._optimizers

    def generators(self) -> dict[str, torch.Generator]:
        """All sources of randomness but PyTorch's global one."""
        return self._generators

    def extra_state(self) -> dict[str, Any]:
        """The examples that this pass still has to come to, and how many there are."""
        # A copy: a slice would be saved with all that it is a slice of.
        return {"queue": self._order.rest.clone(), "count": self._order.count}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes that back; ValueError where it is of another number of examples."""
        count = state.get("count", self._order.count)  # which older checkpoints do not hold
        if count != self._order.count:
            raise ValueError(f"it was trained on {count} examples, and there are {self._order.count} now")
        self._order.rest = torch.as_tensor(state["queue"], dtype=torch.int64).clone()


def train_only(learned: Iterable[nn.Parameter], *parts: nn.Module) -> list[nn.Parameter]:
    """Lets these parameters have gradients, and no others of the parts: with adapters a backbone has none.

    ValueError for a part that learns and has weights in float16, through which gradients underflow, since
    nothing scales the loss here; and for what learns itself in 16 bits, whose updates are rounded away.
    """
    learned = list(learned)
    if short := [p.dtype for p in learned if p.dtype in (torch.float16, torch.bfloat16)]:
        kind = str(short[0]).removeprefix("torch.")
        raise ValueError(
            f"weights in {kind} do not learn here: an update of Adam's size is rounded away. Train weights "
            "in float32 (--dtype float32, in Python model.float(); --precision bf16 computes their products "
            "in bfloat16), or adapters beside weights in bfloat16 (--lora)."
        )
    ids = {id(parameter) for parameter in learned}
    for part in parts:
        own = list(part.parameters())
        if any(p.dtype == torch.float16 for p in own) and any(id(p) in ids for p in own):
            raise ValueError(
                "adapters beside weights in float16 do not learn here: their gradients are too small for "
                "that type. Train with --dtype bfloat16 or float32; float16 is for sampling and evaluation."
            )
    for part in parts:
        for parameter in part.parameters():
            parameter.requires_grad_(id(parameter) in ids)
    return learned


Method = TypeVar("Method", bound=Callable[..., Any])


def forward_pass(method: Method) -> Method:
    """A method of a trainer that calls models: it runs in the trainer's precision."""

    @functools.wraps(method)
    def lowered(self: Trainer, *args: Any, **options: Any) -> Any:
        with self.autocast():
            return method(self, *args, **options)

    return lowered


def linear_share(index: int, steps: int, *, warmup: int = 0, anneal: bool = True) -> float:
    """What of a learning rate is left: a linear warm-up, and with `anneal` a line to 0 at the end."""
    share = (1 - index / steps if anneal else 1.0) * min(1.0, (index + 1) / (warmup + 1))
    return max(share, 0.0)


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
