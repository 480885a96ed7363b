"""Training on pairs of responses that are there. Which algorithm it is stands in the table, not here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palm_rlhf.algorithms.offline_table import PairAlgorithm, Scores
from palm_rlhf.algorithms.preferences import pair_accuracy
from palm_rlhf.models.packing import set_packed
from palm_rlhf.models.value import Policy, set_dropout
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.tokens import Tokenizer, first_ids, prompt_ids
from palm_rlhf.trainers.learner import forward_pass, train_only
from palm_rlhf.trainers.passes import PassesConfig, PassesTrainer
from palm_rlhf.trainers.ranks import ranks


@dataclass(frozen=True)
class OfflineConfig(PassesConfig):
    """How updates are made from pairs, whatever the algorithm."""

    packed: bool | None = None
    """Compute no padding: always, never, or (None) where the model can and it pays."""
    max_tokens: int = 512
    """Tokens of prompt and response at most: a prompt loses its beginning, then a response its end."""
    temperature: float = 1.0
    """Divides the logits; that of the sampler, where the responses are the model's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 2:
            raise ValueError(
                f"max_tokens must be at least 2, a prompt's and a response's, got {self.max_tokens}"
            )


class _Row(NamedTuple):
    """A pair as tokens; `place` is its row among the reference's log-probabilities.

    `other` is the chosen response of the next pair with another prompt: what the policy says of it after this
    prompt estimates the divergence from the reference.
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


class OfflineTrainer(PassesTrainer):
    """A `Learner`: log-probabilities of both responses, a loss for each pair; AdamW."""

    kind = "pairs"

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
        self.algorithm, self.config = algorithm, config
        self.options = algorithm.options() if options is None else options
        without = [pair for pair in (*pairs, *held_out) if pair.margin is None]
        if algorithm.margins(self.options) and without:
            raise ValueError(
                f"{algorithm.name} learns from differences of rewards, and {len(without)} of "
                f"{len(pairs) + len(held_out)} pairs have none, such as the one with chosen="
                f'{without[0].chosen!r:.40}: give each a "margin", by how much the chosen response is better'
            )
        self.policy, self.pad = policy, tokenizer.pad
        self.stop = tokenizer.stop if stop is None else stop
        models = [model for model in (policy, reference) if model is not None]
        set_dropout(0.0, *models)
        set_packed(config.packed, *models)
        rows, judge = self._tokens(pairs, tokenizer), self._tokens(held_out, tokenizer, first=len(pairs))
        train_only(policy.trained(), policy)
        ranks().cut(*(model.model for model in models))
        super().__init__(algorithm.name, "policy", list(policy.trained()), rows, judge, config)
        self._reference = self._reference_scores(policy if reference is None else reference)

    def _losses(self, rows: Sequence[_Row], learn: bool) -> dict[str, float]:
        divergence = self._divergence(rows)
        found = self._means(rows, learn, partial(self._examples, divergence=divergence))
        return found | ({"kl": float(divergence)} if self.algorithm.divergence else {})

    def _examples(
        self, rows: Sequence[_Row], divergence: Tensor | float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self.scores(rows)._replace(divergence=divergence)
        losses, margin = self.algorithm.objective(scores, self.options)
        return losses, {
            "margin": margin, "accuracy": pair_accuracy(margin, torch.zeros_like(margin)),
            "chosen_logprob": scores.chosen, "rejected_logprob": scores.rejected,
        }  # fmt: skip

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
        total = torch.zeros((), device=self.policy.model.device)
        for part, counts in self._micro_batches(rows):
            mine = self._summed(self.policy, [row.prompt for row in part], [row.other for row in part])
            theirs = self._reference[torch.tensor([row.place for row in part]), 2].to(mine)
            total = total + (mine - theirs).sum() * counts
        self.ranks.sum([total])
        return (total / len(rows)).clamp(min=0)

    @torch.no_grad()
    def _reference_scores(self, reference: Policy) -> Tensor | None:
        """[N, 2], or [N, 3] with those for the divergence: of all pairs, held out or not."""
        if not self.algorithm.reference:
            return None
        rows = [*self._rows, *self._held_out]
        columns = 3 if self.algorithm.divergence else 2
        found = torch.zeros(len(rows), columns)
        for part, counts in self._micro_batches(rows):
            responses = [row[1 + column] for column in range(columns) for row in part]
            summed = self._summed(reference, [row.prompt for row in part] * columns, responses)
            if counts:
                found[[row.place for row in part]] = summed.view(columns, len(part)).t().float().cpu()
        # Every process has filled the places of its share.
        return sum(self.ranks.everyones(found))

    @forward_pass
    def _summed(self, policy: Policy, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        """[B]: log-probabilities of responses after their prompts, at the temperature of the sampler."""
        return policy.response_logprob(prompts, responses, self.pad, self.config.temperature)

    def _tokens(self, pairs: Sequence[Pair], tokenizer: Tokenizer, first: int = 0) -> list[_Row]:
        end = [self.stop] if self.config.stop else []
        split = []
        for pair in pairs:
            if pair.tokens is not None:
                prompt, *both = map(list, pair.tokens)
            else:
                prompt = prompt_ids(tokenizer, pair.prompt)
                both = [tokenizer.encode(text) for text in (pair.chosen, pair.rejected)]
                both = [[*response, *end] for response in both]
            if not prompt:
                # A text follows the end of another; what both dialogues begin with is what they respond to.
                same = _common(*both)
                start = first_ids(tokenizer) or [self.stop]
                prompt, both = [*start, *both[0][:same]], [response[same:] for response in both]
            split.append((prompt, *both))
        found, others = [], _others([prompt for prompt, _, _ in split])
        for i, (pair, (prompt, chosen, rejected)) in enumerate(zip(pairs, split)):
            texts = self._cut(prompt, (chosen, rejected, split[others[i]][1]))
            found.append(_Row(*texts, pair.margin or 0.0, first + i))
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
        chosen, rejected, other = (response[: limit - 1] for response in responses)
        prompt = prompt[-(limit - max(len(chosen), len(rejected))) :]
        # The prompt is that of its own responses: the other one has the room that it leaves.
        return prompt, chosen, rejected, other[: limit - len(prompt)]

    def modules(self) -> dict[str, nn.Module]:
        """The policy's model, with its adapters."""
        return {"policy": self.policy.model}


def _others(prompts: Sequence[list[int]]) -> list[int]:
    """For each place the next one, the first after the last, with another prompt; else the next one."""
    count = len(prompts)
    following = [(i + 1) % count for i in range(count)]
    found = list(following)
    # From the end, so that each knows where the run of its prompt ends; twice, since the last run may go on
    # in front.
    for i in [*range(count)][::-1] * 2:
        if prompts[found[i]] == prompts[i]:
            found[i] = found[following[i]]
    return [after if prompts[at] == own else at for at, after, own in zip(found, following, prompts)]


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with, but for the last one of either."""
    longest = max(min(len(one), len(other)) - 1, 0)
    return next((i for i in range(longest) if one[i] != other[i]), longest)
