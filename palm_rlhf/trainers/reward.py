"""Training of reward models: which of two responses is better, or what one is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from palm_rlhf.algorithms.preferences import (
    bradley_terry_loss,
    centring_loss,
    expected_value,
    pair_accuracy,
)
from palm_rlhf.rewards.model import RewardModel
from palm_rlhf.tasks.pairs import Labelled, Pair
from palm_rlhf.tokens import Tokenizer, first_ids, prompt_ids
from palm_rlhf.trainers.learner import train_only
from palm_rlhf.trainers.passes import PassesConfig, PassesTrainer
from palm_rlhf.trainers.ranks import ranks


@dataclass(frozen=True)
class RewardConfig(PassesConfig):
    """How preferences are learned, from pairs and labels alike; reward models overfit in a second pass."""

    max_tokens: int = 512
    """Tokens of a text at most, prompt and stop token included; longer ones lose their beginning."""
    margin: float = 1.0
    """Factor of the pairs' margins in their loss; 0 leaves them out."""
    centring: float = 0.0
    """Weight of the square of a pair's summed rewards, which keeps rewards around 0; 0.01 is usual."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("margin", "centring"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


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


class RewardTrainer(PassesTrainer):
    """A `Learner`: Bradley-Terry on pairs, cross-entropy or squared error on labels; AdamW."""

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
            stop: token behind every text that is not given as tokens; the tokenizer's by default.

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
        rows, judge = ([self._row(x, tokenizer, end) for x in given] for given in (examples, held_out))
        train_only(model.finetune_parameters(), model)
        ranks().cut(model.palm)
        super().__init__("reward", "reward", model.finetune_parameters(), rows, judge, config)

    def _learning(self, on: bool) -> None:
        self.model.train(on)

    def _examples(self, rows: Sequence[_Row]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each example; of pairs accuracy, difference and mean reward, of labels the error.

        Of labels in bins the accuracy as well.
        """
        tokens, mask, prompt_mask = self._batch(
            [row.texts[k] for k in range(len(rows[0].texts)) for row in rows]
        )
        if self.pairs:
            with self.autocast():
                chosen, rejected = self.model.pair_scores(tokens, mask, prompt_mask)
            c, margin = self.config, self._numbers(rows, chosen.dtype)
            losses = bradley_terry_loss(chosen, rejected, c.margin * margin)
            if c.centring:
                losses = losses + c.centring * centring_loss(chosen, rejected)
            chosen, rejected = chosen.detach(), rejected.detach()
            figures = {"accuracy": pair_accuracy(chosen, rejected), "difference": chosen - rejected}
            return losses, figures | {"reward": (chosen + rejected) / 2}
        with self.autocast():
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

    def _row(self, example: Pair | Labelled, tokenizer: Tokenizer, end: list[int]) -> _Row:
        if isinstance(example, Pair) and example.tokens is not None:
            # As they were sampled: a response that was cut off has no stop token.
            prompt, *responses = map(list, example.tokens)
        else:
            prompt = prompt_ids(tokenizer, example.prompt) or first_ids(tokenizer)
            both = (example.chosen, example.rejected) if isinstance(example, Pair) else (example.text,)
            responses = [[*tokenizer.encode(response), *end] for response in both]
        texts = tuple(self._text(prompt, response) for response in responses)
        if isinstance(example, Pair):
            return _Row(texts, example.margin or 0.0)
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

    def modules(self) -> dict[str, nn.Module]:
        """The reward model, its backbone included."""
        return {"reward": self.model}
