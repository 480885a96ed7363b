"""Training by passes over examples that are there, each with a loss of its own: preferences, and labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from palm_rlhf.checks import check_options
from palm_rlhf.trainers.learner import Order, Precision, Trainer, linear_share


@dataclass(frozen=True)
class PassesConfig:
    """How updates are made from examples; a pair is one."""

    epochs: int = 1
    """Passes over the examples."""
    batch: int = 32
    """Examples in one update; a pair is one."""
    micro_batch: int | None = None
    """Examples in one forward pass, to save memory; None: the batch."""
    lr: float = 1e-4
    """Learning rate."""
    warmup: int = 0
    """Updates over which the learning rate rises."""
    anneal: bool = True
    """Let the learning rate fall to 0 over the run."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float | None = 1.0
    """Clip gradients to this norm; None: not."""
    precision: Precision = "float32"
    """Of products; with bf16 weights, log-probabilities and losses stay float32."""
    max_tokens: int = 512
    """Tokens of a text at most."""
    stop: bool = True
    """End every text with the stop token, as a finished response does."""
    eval_every: int = 50
    """Updates between two looks at the examples held back; the last update is always followed by one."""
    seed: int = 0
    """Of the order of examples."""

    def __post_init__(self) -> None:
        check_options(self)


# An example as tokens: it has a `length`.
Row = TypeVar("Row")


class PassesTrainer(Trainer):
    """A `Learner` but for `modules` and the loss of an example, `_examples`; AdamW."""

    # What the examples are called in errors.
    kind = "examples"

    def __init__(
        self,
        name: str,
        part: str,
        learned: Sequence[nn.Parameter],
        rows: Sequence[Any],
        held_out: Sequence[Any],
        config: PassesConfig,
    ) -> None:
        """`learned` are the parameters of the module `part`."""
        self.config, self._rows, self._held_out, self._part = config, rows, held_out, part
        generator = torch.Generator().manual_seed(config.seed)
        # eps as in Ziegler et al., 2019: TensorFlow's Adam divides by more than PyTorch's.
        optimizer = torch.optim.AdamW(learned, lr=config.lr, eps=1e-5, weight_decay=config.weight_decay)
        super().__init__(
            name,
            Order(len(rows), generator, across=False),
            {part: optimizer},
            {"order": generator},
            batch=config.batch,
            max_grad_norm=config.max_grad_norm,
            precision=config.precision,
        )

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * math.ceil(len(self._rows) / self.config.batch)

    def rates(self, index: int) -> dict[str, float]:
        """A warm-up, then a line to 0."""
        c = self.config
        return {self._part: c.lr * linear_share(index, self.steps, warmup=c.warmup, anneal=c.anneal)}

    def step(self, index: int) -> dict[str, float]:
        """One update."""
        c = self.config
        self._learning(True)
        rows = [self._rows[i] for i in self._next_indices()]
        self._set_rates(index)
        found = self._losses(rows, learn=True)
        (norm,) = self._apply(index, found["loss"]).values()
        found |= {"lr": self.rates(index)[self._part], "grad_norm": norm}
        if self._held_out and ((index + 1) % c.eval_every == 0 or index + 1 == self.steps):
            found |= {f"held_out_{name}": value for name, value in self.evaluate().items()}
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over the examples held back, without dropout: the loss, and the figures of its kind.

        Raises:
            ValueError: nothing is held back.
        """
        if not self._held_out:
            raise ValueError(f"evaluate: no {self.kind} are held back")
        self._learning(False)
        return self._losses(self._held_out, learn=False)

    def _learning(self, on: bool) -> None:
        """Turns dropout on or off, where there is any."""

    def _losses(self, rows: Sequence[Row], learn: bool) -> dict[str, float]:
        """Means over these examples; with `learn` the mean loss leaves its gradients in the parameters."""
        return self._means(rows, learn, self._examples)

    def _examples(self, rows: Sequence[Row]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of each example [B], and figures of each to log."""
        raise NotImplementedError

    def _means(
        self,
        rows: Sequence[Row],
        learn: bool,
        examples: Callable[[Sequence[Row]], tuple[Tensor, Mapping[str, Tensor]]],
    ) -> dict[str, float]:
        sums: dict[str, float] = {}
        for part, counts in self._micro_batches(rows):
            losses, figures = examples(part)
            if learn:
                # Over the number of examples in the whole update: the parts' sizes differ.
                (losses.sum() / len(rows) * counts).backward()
            if not counts:
                continue
            for name, values in {"loss": losses, **figures}.items():
                sums[name] = sums.get(name, 0.0) + float(values.detach().double().sum())
        return {name: value / len(rows) for name, value in self.ranks.summed(sums).items()}

    def _micro_batches(self, rows: Sequence[Row]) -> Iterator[tuple[list[Row], bool]]:
        """This process's share of them, texts of like length together: less padding, and as much for each.

        With each part whether it counts; see `Ranks.in_step`.
        """
        size = self.config.micro_batch or self.config.batch
        ordered = sorted(rows, key=lambda row: row.length)
        own = ordered[self.ranks.index :: self.ranks.count]
        parts = (own[start : start + size] for start in range(0, len(own), size))
        return self.ranks.in_step(parts, lambda: ordered[:1])
