"""Training of reward models: which of two responses is better, or what one is worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palm_rlhf.algorithms.preferences import bradley_terry_loss, expected_value, pair_accuracy
from palm_rlhf.rewards.model import RewardModel
from palm_rlhf.tasks.pairs import Labelled, Pair
from palm_rlhf.tokens import Tokenizer, first_ids, prompt_ids


@dataclass(frozen=True)
class RewardConfig:
    """How preferences are learned, from pairs and labels alike."""

    epochs: int = 1
    """Passes over the examples; reward models overfit in the second."""
    batch: int = 32
    """Examples in one update; a pair is one."""
    micro_batch: int | None = None
    """Examples in one forward pass, to save memory; None: the batch."""
    lr: float = 1e-4
    """Learning rate of the first update."""
    anneal: bool = True
    """Let the learning rate fall to 0 over the run."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float | None = 1.0
    """Clip gradients to this norm; None: not."""
    max_tokens: int = 512
    """Tokens of a text at most, prompt and stop token included; longer ones lose their beginning."""
    stop: bool = True
    """End every text with the stop token, as a finished response does."""
    eval_every: int = 50
    """Updates between two looks at the examples held back; the last update is always followed by one."""
    seed: int = 0
    """Of the order of examples."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "max_tokens", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 or None, got {self.micro_batch}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be above 0, got {self.lr}")


class _Text(NamedTuple):
    tokens: list[int]
    prompt: int


class _Row(NamedTuple):
    """An example as tokens: the chosen and the rejected text and their margin, or one text and its label."""

    texts: tuple[_Text, ...]
    number: float

    @property
    def length(self) -> int:
        return max(len(text.tokens) for text in self.texts)


class RewardTrainer:
    """A `Learner`: Bradley-Terry on pairs, cross-entropy or squared error on labels; AdamW."""

    name = "reward"

    def __init__(
        self,
        model: RewardModel,
        examples: Sequence[Pair] | Sequence[Labelled],
        tokenizer: Tokenizer,
        *,
        config: RewardConfig,
        held_out: Sequence[Pair] | Sequence[Labelled] = (),
        stop: int | None = None,
    ) -> None:
        """
        Args:
            model: learns; with adapters its backbone does not.
            examples: all pairs, or all labelled.
            tokenizer: makes the tokens.
            config: sizes and rates.
            held_out: examples of the same kind that judge.
            stop: token behind every text; the tokenizer's by default.

        Raises:
            ValueError: there are no examples, they are of both kinds, the tokenizer does not fit the model,
                or a label is no bin.
        """
        everything = [*examples, *held_out]
        if not examples:
            raise ValueError("there are no examples to learn from")
        kinds = sorted({type(example).__name__ for example in everything})
        if len(kinds) > 1:
            raise ValueError(f"examples must be of one kind, got {' and '.join(kinds)}")
        self.model, self.config = model, config
        self.pairs = isinstance(examples[0], Pair)
        self.pad = tokenizer.pad
        # Without prompts the model must not learn that all is response: it will see prompts.
        self._prompts = any(example.prompt for example in everything)
        end = [] if not config.stop else [tokenizer.stop if stop is None else stop]
        self._rows = [self._row(example, tokenizer, end) for example in examples]
        self._held_out = [self._row(example, tokenizer, end) for example in held_out]
        self._queue: list[int] = []
        self._generator = torch.Generator().manual_seed(config.seed)
        learned = model.finetune_parameters()
        ids = {id(parameter) for parameter in learned}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in ids)
        # eps as in Ziegler et al., 2019: TensorFlow's Adam divides by more than PyTorch's.
        self._optimizer = torch.optim.AdamW(learned, lr=config.lr, eps=1e-5, weight_decay=config.weight_decay)

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * math.ceil(len(self._rows) / self.config.batch)

    def step(self, index: int) -> dict[str, float]:
        """One update."""
        c = self.config
        self.model.train()
        rows = [self._rows[i] for i in self._next_indices()]
        rate = c.lr * max(0.0, 1 - index / self.steps) if c.anneal else c.lr
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        sums: dict[str, float] = {}
        for part in self._micro_batches(rows):
            losses, figures = self._losses(part)
            # Over the number of examples in the whole update: the parts' sizes differ.
            (losses.sum() / len(rows)).backward()
            _add(sums, {"loss": losses, **figures})
        parameters = self._optimizer.param_groups[0]["params"]
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if c.max_grad_norm is None else c.max_grad_norm)
        if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):
            raise ValueError(
                f"the loss is {sums['loss'] / len(rows)} at step {index + 1}. "
                f"Lower the learning rate ({c.lr})."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        found = {name: value / len(rows) for name, value in sums.items()} | {
            "lr": rate,
            "grad_norm": float(norm),
        }
        if self._held_out and ((index + 1) % c.eval_every == 0 or index + 1 == self.steps):
            found |= {f"held_out_{name}": value for name, value in self.evaluate().items()}
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over the examples held back, without dropout.

        The loss; of pairs the accuracy and the difference of rewards; of labels the absolute error and, in
        bins, the accuracy.

        Raises:
            ValueError: nothing is held back.
        """
        if not self._held_out:
            raise ValueError("evaluate: no examples are held back")
        self.model.eval()
        sums: dict[str, float] = {}
        for part in self._micro_batches(self._held_out):
            losses, figures = self._losses(part)
            _add(sums, {"loss": losses, **figures})
        return {name: value / len(self._held_out) for name, value in sums.items()}

    def _losses(self, rows: Sequence[_Row]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each example, and figures of each to log."""
        tokens, mask, prompt_mask = self._batch(
            [row.texts[k] for k in range(len(rows[0].texts)) for row in rows]
        )
        if self.pairs:
            chosen, rejected = self.model.pair_scores(tokens, mask, prompt_mask)
            losses = bradley_terry_loss(chosen, rejected, self._numbers(rows, chosen.dtype))
            chosen, rejected = chosen.detach(), rejected.detach()
            return losses, {"accuracy": pair_accuracy(chosen, rejected), "difference": chosen - rejected}
        predictions = self.model.predictions(tokens, mask, prompt_mask)
        if not self.model.binned_output:
            labels = self._numbers(rows, predictions.dtype)
            return self.model.label_loss(predictions, labels), {
                "error": (predictions.detach() - labels).abs()
            }
        labels = self._numbers(rows, torch.int64)
        found = predictions.detach()
        figures = {
            "accuracy": (found.argmax(-1) == labels).float(),
            "error": (expected_value(found) - labels).abs(),
        }
        return self.model.label_loss(predictions, labels), figures

    def _numbers(self, rows: Sequence[_Row], dtype: torch.dtype) -> Tensor:
        return torch.tensor([row.number for row in rows], device=self.model.palm.device).to(dtype)

    def _batch(self, texts: Sequence[_Text]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens and mask [B, T], padded on the right, and the prompts' mask where there are prompts."""
        lengths = torch.tensor([len(text.tokens) for text in texts])
        place = torch.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        tokens = torch.full(mask.shape, self.pad)
        tokens[mask] = torch.tensor([token for text in texts for token in text.tokens])
        prompts = place < torch.tensor([text.prompt for text in texts])[:, None]
        device = self.model.palm.device
        return tokens.to(device), mask.to(device), prompts.to(device) if self._prompts else None

    def _micro_batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Texts of like length together: less padding."""
        size = self.config.micro_batch or self.config.batch
        ordered = sorted(rows, key=lambda row: row.length)
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]

    def _row(self, example: Pair | Labelled, tokenizer: Tokenizer, end: list[int]) -> _Row:
        prompt = prompt_ids(tokenizer, example.prompt) or first_ids(tokenizer)
        responses = (example.chosen, example.rejected) if isinstance(example, Pair) else (example.text,)
        texts = tuple(self._text(prompt, [*tokenizer.encode(response), *end]) for response in responses)
        if isinstance(example, Pair):
            return _Row(texts, example.margin)
        bins = self.model.to_pred.out_features
        if self.model.binned_output and not (
            example.label == int(example.label) and 0 <= example.label < bins
        ):
            raise ValueError(
                f"labels of this model are bins from 0 to {bins - 1}, "
                f"got {example.label:g} for {example.text[:60]!r}"
            )
        return _Row(texts, example.label)

    def _text(self, prompt: list[int], response: list[int]) -> _Text:
        """The end of it, which is where a response is."""
        longest = self.model.palm.max_length
        limit = self.config.max_tokens if longest is None else min(longest, self.config.max_tokens)
        tokens = [*prompt, *response]
        if not tokens:
            raise ValueError("an example has no tokens. Leave it out, or let texts end with the stop token.")
        if max(tokens) >= self.model.palm.num_tokens or min(tokens) < 0:
            raise ValueError(
                f"token ids must be from 0 to {self.model.palm.num_tokens - 1}, got {max(tokens)}. "
                "Does the tokenizer belong to this model?"
            )
        tokens = tokens[-limit:]
        return _Text(tokens, max(0, len(tokens) - len(response)))

    def _next_indices(self) -> list[int]:
        """The next of a pass, in a fresh order each time; the last batch of a pass may be smaller."""
        if not self._queue:
            self._queue = torch.randperm(len(self._rows), generator=self._generator).tolist()
        taken, self._queue = self._queue[: self.config.batch], self._queue[self.config.batch :]
        return taken

    def modules(self) -> dict[str, nn.Module]:
        """The reward model, its backbone included."""
        return {"reward": self.model}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """AdamW."""
        return {"reward": self._optimizer}

    def generators(self) -> dict[str, torch.Generator]:
        """Of the order of examples."""
        return {"order": self._generator}

    def extra_state(self) -> dict[str, Any]:
        """The examples that this pass still has to come to."""
        return {"queue": list(self._queue)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes that back."""
        self._queue = list(state["queue"])


def _add(sums: dict[str, float], figures: dict[str, Tensor]) -> None:
    for name, values in figures.items():
        sums[name] = sums.get(name, 0.0) + float(values.detach().double().sum())
