"""Training on pairs of responses that are there. Which algorithm it is stands in the table, not here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palm_rlhf.algorithms.offline_table import PairAlgorithm, Scores
from palm_rlhf.algorithms.preferences import pair_accuracy
from palm_rlhf.models.value import Policy, set_dropout
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.tokens import Tokenizer


@dataclass(frozen=True)
class OfflineConfig:
    """How updates are made from pairs, whatever the algorithm."""

    epochs: int = 1
    """Passes over the pairs."""
    batch: int = 32
    """Pairs in one update."""
    micro_batch: int | None = None
    """Pairs in one forward pass, to save memory; None: the batch."""
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
    max_tokens: int = 512
    """Tokens of prompt and response at most: a prompt loses its beginning, then a response its end."""
    temperature: float = 1.0
    """Divides the logits; that of the sampler, where the responses are the model's own."""
    stop: bool = True
    """End every response with the stop token."""
    eval_every: int = 50
    """Updates between two looks at the pairs held back; the last update is always followed by one."""
    seed: int = 0
    """Of the order of pairs."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_tokens < 2:
            raise ValueError(
                f"max_tokens must be at least 2, a prompt's and a response's, got {self.max_tokens}"
            )
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1 or None, got {self.micro_batch}")
        for name in ("lr", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be above 0, got {value}")


class _Row(NamedTuple):
    """A pair as tokens; `place` is its row among the reference's log-probabilities.

    `other` is the chosen response of the next pair: what the policy says of it after this prompt estimates
    the divergence from the reference.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    other: list[int]
    difference: float
    place: int

    @property
    def length(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class OfflineTrainer:
    """A `Learner`: log-probabilities of both responses, a loss for each pair; AdamW."""

    def __init__(
        self,
        algorithm: PairAlgorithm,
        policy: Policy,
        pairs: Sequence[Pair],
        tokenizer: Tokenizer,
        *,
        config: OfflineConfig,
        options: Any = None,
        reference: Policy | None = None,
        held_out: Sequence[Pair] = (),
        stop: int | None = None,
    ) -> None:
        """
        Args:
            algorithm: a row of `algorithms.offline_table.PAIR_ALGORITHMS`.
            policy: what learns. Dropout is turned off in it and in the reference.
            pairs: to learn from. tokenizer: makes their tokens.
            config: sizes and rates. options: the algorithm's, its defaults if None.
            reference: by default the policy as it is now. Its log-probabilities are computed here, once, so
                that it need not be kept: with adapters it is the policy's model without them.
            held_out: pairs that judge.
            stop: token behind every response, and before one without a prompt; the tokenizer's by default.

        Raises:
            ValueError: there are no pairs, they lack what the algorithm needs, or a token is not the model's.
        """
        if not pairs:
            raise ValueError("there are no pairs to learn from")
        if algorithm.margins and not any(pair.margin for pair in pairs):
            raise ValueError(
                f"{algorithm.name} learns from differences of rewards, and no pair has one: give each a "
                '"margin", by how much the chosen response is better'
            )
        self.name, self.algorithm, self.config = algorithm.name, algorithm, config
        self.options = algorithm.options() if options is None else options
        self.policy, self.pad = policy, tokenizer.pad
        self.stop = tokenizer.stop if stop is None else stop
        set_dropout(0.0, *(model for model in (policy, reference) if model is not None))
        self._rows = self._tokens(pairs, tokenizer)
        self._held_out = self._tokens(held_out, tokenizer, first=len(pairs))
        self._queue: list[int] = []
        self._generator = torch.Generator().manual_seed(config.seed)
        self._reference = self._reference_scores(policy if reference is None else reference)
        learned = list(policy.trained())
        ids = {id(parameter) for parameter in learned}
        for parameter in policy.parameters():
            parameter.requires_grad_(id(parameter) in ids)
        self._optimizer = torch.optim.AdamW(learned, lr=config.lr, eps=1e-5, weight_decay=config.weight_decay)

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return self.config.epochs * math.ceil(len(self._rows) / self.config.batch)

    def step(self, index: int) -> dict[str, float]:
        """One update."""
        c = self.config
        rows = [self._rows[i] for i in self._next_indices()]
        rate = self._set_rate(index)
        found = self._losses(rows, learn=True)
        parameters = self._optimizer.param_groups[0]["params"]
        norm = nn.utils.clip_grad_norm_(parameters, math.inf if c.max_grad_norm is None else c.max_grad_norm)
        if not (math.isfinite(found["loss"]) and math.isfinite(norm)):
            raise ValueError(
                f"the loss is {found['loss']} at step {index + 1}. Lower the learning rate ({c.lr})."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        found |= {"lr": rate, "grad_norm": float(norm)}
        if self._held_out and ((index + 1) % c.eval_every == 0 or index + 1 == self.steps):
            found |= {f"held_out_{name}": value for name, value in self.evaluate().items()}
        return found

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over the pairs held back: loss, accuracy and margin; ValueError where there are none."""
        if not self._held_out:
            raise ValueError("evaluate: no pairs are held back")
        return self._losses(self._held_out, learn=False)

    def _losses(self, rows: Sequence[_Row], learn: bool) -> dict[str, float]:
        """Means over these pairs; with `learn` the gradients of the mean loss are left in the parameters."""
        divergence = self._divergence(rows)
        sums: dict[str, float] = {}
        for part in self._micro_batches(rows):
            scores = self.scores(part)._replace(divergence=divergence)
            losses, margin = self.algorithm.objective(scores, self.options)
            if learn:
                # Over the number of pairs in the whole update: the parts' sizes differ.
                (losses.sum() / len(rows)).backward()
            figures = {
                "loss": losses, "margin": margin, "accuracy": pair_accuracy(margin, torch.zeros_like(margin)),
                "chosen_logprob": scores.chosen, "rejected_logprob": scores.rejected,
            }  # fmt: skip
            for name, values in figures.items():
                sums[name] = sums.get(name, 0.0) + float(values.detach().double().sum())
        found = {name: value / len(rows) for name, value in sums.items()}
        return found | ({"kl": float(divergence)} if self.algorithm.divergence else {})

    def scores(self, rows: Sequence[_Row]) -> Scores:
        """What the policy finds for these pairs, and what the reference found."""
        both = [row.chosen for row in rows] + [row.rejected for row in rows]
        summed = self._summed(self.policy, [row.prompt for row in rows] * 2, both)
        count = torch.tensor([len(response) for response in both], device=summed.device)
        (chosen, rejected), (chosen_tokens, rejected_tokens) = summed.chunk(2), count.chunk(2)
        difference = torch.tensor([row.difference for row in rows], device=summed.device, dtype=summed.dtype)
        known: dict[str, Tensor] = {}
        if self.algorithm.reference:
            places = torch.tensor([row.place for row in rows])
            taken = self._reference[places].to(summed)
            known = {"reference_chosen": taken[:, 0], "reference_rejected": taken[:, 1]}
        return Scores(chosen, rejected, chosen_tokens, rejected_tokens, difference, **known)

    @torch.no_grad()
    def _divergence(self, rows: Sequence[_Row]) -> Tensor | float:
        """KL(policy || reference) for an update: mean ratio of responses to other prompts, at least 0."""
        if not self.algorithm.divergence:
            return 0.0
        total = 0.0
        for part in self._micro_batches(rows):
            mine = self._summed(self.policy, [row.prompt for row in part], [row.other for row in part])
            theirs = self._reference[torch.tensor([row.place for row in part]), 2].to(mine)
            total = total + (mine - theirs).sum()
        return (total / len(rows)).clamp(min=0)

    @torch.no_grad()
    def _reference_scores(self, reference: Policy) -> Tensor | None:
        """[N, 2], or [N, 3] with those for the divergence: of all pairs, held out or not."""
        if not self.algorithm.reference:
            return None
        rows = [*self._rows, *self._held_out]
        columns = 3 if self.algorithm.divergence else 2
        found = torch.zeros(len(rows), columns)
        for part in self._micro_batches(rows):
            responses = [row[1 + column] for column in range(columns) for row in part]
            summed = self._summed(reference, [row.prompt for row in part] * columns, responses)
            found[[row.place for row in part]] = summed.view(columns, len(part)).t().float().cpu()
        return found

    def _summed(self, policy: Policy, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        """[B]: log-probabilities of responses after their prompts, at the temperature of the sampler."""
        return policy.response_logprob(prompts, responses, self.pad, self.config.temperature)

    def _micro_batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Pairs of like length together: less padding."""
        size = self.config.micro_batch or self.config.batch
        ordered = sorted(rows, key=lambda row: row.length)
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]

    def _tokens(self, pairs: Sequence[Pair], tokenizer: Tokenizer, first: int = 0) -> list[_Row]:
        end = [self.stop] if self.config.stop else []
        split = []
        for pair in pairs:
            if pair.tokens is not None:
                prompt, *both = map(list, pair.tokens)
            else:
                prompt, *both = map(tokenizer.encode, (pair.prompt, pair.chosen, pair.rejected))
                both = [[*response, *end] for response in both]
            if not prompt:
                # A text follows the end of another; what both dialogues begin with is what they respond to.
                same = _common(*both)
                prompt, both = [self.stop, *both[0][:same]], [response[same:] for response in both]
            split.append((prompt, *both))
        found = []
        for i, (pair, (prompt, chosen, rejected)) in enumerate(zip(pairs, split)):
            other = split[(i + 1) % len(split)][1]
            found.append(_Row(*self._cut(prompt, (chosen, rejected, other)), pair.margin, first + i))
        return found

    def _cut(self, prompt: list[int], responses: Sequence[list[int]]) -> tuple[list[int], ...]:
        """Prompt and responses that fit, at least one token each; ValueError for a token out of range."""
        longest, vocabulary = self.policy.model.max_length, self.policy.model.num_tokens
        limit = self.config.max_tokens if longest is None else min(longest, self.config.max_tokens)
        if not all(responses):
            raise ValueError("a response has no tokens. Leave the pair out, or let responses end with stop.")
        worst = max(max(part) for part in (prompt, *responses))
        if worst >= vocabulary:
            raise ValueError(
                f"token ids must be from 0 to {vocabulary - 1}, got {worst}. Does the tokenizer belong to "
                "this model?"
            )
        responses = [response[: limit - 1] for response in responses]
        room = limit - max(map(len, responses[:2]))
        return prompt[-room:], *responses[:2], responses[2][: limit - 1]

    def _set_rate(self, index: int) -> float:
        c = self.config
        share = (1 - index / self.steps if c.anneal else 1.0) * min(1.0, (index + 1) / (c.warmup + 1))
        rate = c.lr * max(share, 0.0)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _next_indices(self) -> list[int]:
        """The next of a pass, in a fresh order each time; the last batch of a pass may be smaller."""
        if not self._queue:
            self._queue = torch.randperm(len(self._rows), generator=self._generator).tolist()
        taken, self._queue = self._queue[: self.config.batch], self._queue[self.config.batch :]
        return taken

    def modules(self) -> dict[str, nn.Module]:
        """The policy's model, with its adapters."""
        return {"policy": self.policy.model}

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """AdamW."""
        return {"policy": self._optimizer}

    def generators(self) -> dict[str, torch.Generator]:
        """Of the order of pairs."""
        return {"order": self._generator}

    def extra_state(self) -> dict[str, Any]:
        """The pairs that this pass still has to come to."""
        return {"queue": list(self._queue)}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes that back."""
        self._queue = list(state["queue"])


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with, but for the last one of either."""
    longest = max(min(len(one), len(other)) - 1, 0)
    return next((i for i in range(longest) if one[i] != other[i]), longest)
