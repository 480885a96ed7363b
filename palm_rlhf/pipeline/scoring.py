"""Scores of responses: by a reward model, by a classifier of Hugging Face, or by a rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from palm_rlhf.generation import Generation
from palm_rlhf.padding import side_by_side
from palm_rlhf.rewards import Ensemble, ImplicitReward, ModelReward, ProgrammaticReward, RewardError
from palm_rlhf.rewards.classifier import Classifier
from palm_rlhf.tokens import Tokenizer, first_ids, identity, prompt_ids


@dataclass(frozen=True)
class Answer:
    """A response with what it answers.

    Attributes:
        messages: the dialogue, without a template; empty where there is none.
        prompt, response: texts as the model read and wrote them.
        prompt_tokens, tokens: their ids; the stop token is the last of a response that came to one.
        stopped: whether it did.
    """

    messages: Sequence[Mapping[str, str]]
    prompt: str
    response: str
    prompt_tokens: Sequence[int]
    tokens: Sequence[int]
    stopped: bool = True

    @property
    def question(self) -> str:
        """What the last message says."""
        return self.messages[-1]["content"] if self.messages else self.prompt


class Scorer(Protocol):
    """From responses to one finite number each, higher for better ones."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Their scores."""
        ...


def answers_of(rows: Iterable[Mapping[str, Any]]) -> list[Answer]:
    """All responses of the rows of a file of samples, in its order."""
    return [
        Answer(row["messages"], row["prompt"], response, row["prompt_tokens"], tokens, stopped)
        for row in rows
        for response, tokens, stopped in zip(row["responses"], row["response_tokens"], row["stopped"])
    ]


def scored(rows: Sequence[Mapping[str, Any]], scorer: Scorer) -> list[dict[str, Any]]:
    """The rows with "scores"; RewardError where one is not finite."""
    answers = answers_of(rows)
    left = iter(finite(scorer(answers), answers))
    return [{**row, "scores": [next(left) for _ in row["responses"]]} for row in rows]


def finite(scores: Sequence[float], answers: Sequence[Answer]) -> list[float]:
    """The scores; RewardError where one is not finite."""
    for score, answer in zip(scores, answers, strict=True):
        if not abs(score) < float("inf"):
            raise RewardError(f"the score is {score} for the response {answer.response!r:.100}")
    return list(scores)


class RuleScorer:
    """A function of (prompt, response): the prompt is the last message, without a template."""

    def __init__(self, rule: ProgrammaticReward) -> None:
        self._rule = rule

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Its numbers; RewardError where it fails."""
        return [self._rule.score(answer.question, answer.response) for answer in answers]


class TokenScorer:
    """What reads tokens: the sampled ones where they are its own, else those of the texts."""

    def __init__(self, tokenizer: Tokenizer, stop: int, sampled_with: str) -> None:
        """`tokenizer` and `stop` are the model's, `sampled_with` the `identity` of the sampler's."""
        self._tokenizer, self._stop = tokenizer, stop
        self._same = identity(tokenizer) == sampled_with

    def _tokens(self, answer: Answer) -> tuple[Sequence[int], Sequence[int]]:
        if self._same and answer.tokens:
            return answer.prompt_tokens, answer.tokens
        # As in its training, `trainers.reward`.
        t = self._tokenizer
        asked = list(answer.messages) if getattr(t, "chat", False) else answer.prompt
        end = [self._stop] if answer.stopped else []
        return prompt_ids(t, asked) or first_ids(t), [*t.encode(answer.response), *end]


class RewardModelScorer(TokenScorer):
    """A reward model of ours."""

    def __init__(self, reward: ModelReward, tokenizer: Tokenizer, stop: int, sampled_with: str) -> None:
        """See `TokenScorer`."""
        super().__init__(tokenizer, stop, sampled_with)
        self._reward = reward

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Its rewards."""
        found = dict.fromkeys(range(len(answers)), 0.0)
        # Without prompts a reward model is trained without the mark of what is prompt and what response.
        for bare in (False, True):
            index = [i for i, answer in enumerate(answers) if bool(answer.prompt) is not bare]
            if index:
                prompts, responses = zip(*(self._tokens(answers[i]) for i in index))
                if bare:
                    prompts = [[*before, *after] for before, after in zip(prompts, responses)]
                    responses = [()] * len(index)
                generation = as_generation(prompts, responses, self._tokenizer.pad)
                found.update(zip(index, self._reward(generation, mark_prompt=not bare).tolist()))
        return list(found.values())


class ImplicitScorer(TokenScorer):
    """What training by preferences made more probable in a run."""

    def __init__(self, reward: ImplicitReward, tokenizer: Tokenizer, stop: int, sampled_with: str) -> None:
        """See `TokenScorer`."""
        super().__init__(tokenizer, stop, sampled_with)
        self._reward = reward

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Its rewards."""
        prompts, responses = zip(*map(self._tokens, answers))
        # As in its training, `trainers.offline`: a text without a prompt follows the end of another.
        prompts = [prompt or [self._stop] for prompt in prompts]
        return self._reward(as_generation(prompts, responses, self._tokenizer.pad)).tolist()


class EnsembleScorer:
    """Several scorers as one."""

    def __init__(self, ensemble: Ensemble) -> None:
        """`ensemble.rewards` are the scorers."""
        self._ensemble = ensemble

    @property
    def cut(self) -> int:
        """How many texts lost their beginning."""
        return sum(getattr(scorer, "cut", 0) for scorer in self._ensemble.rewards)

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Their combination."""
        found = [finite(scorer(answers), answers) for scorer in self._ensemble.rewards]
        return self._ensemble.combined(torch.tensor(found, dtype=torch.float64)).tolist()


def as_generation(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int
) -> Generation:
    """Prompts and responses as rewards take them, without log-probabilities."""
    tokens, mask, width = side_by_side(prompts, responses, pad)
    nothing = torch.zeros(len(tokens), tokens.shape[1] - width)
    return Generation(tokens, mask, width, nothing, nothing, torch.zeros(len(tokens), dtype=torch.bool))


class ClassifierScorer:
    """A classifier of transformers, which reads a dialogue in its own chat template where it has one."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        # How many texts lost their beginning.
        self.cut = 0

    def text(self, answer: Answer) -> str:
        """What it reads: the dialogue in its template, or prompt and response as they are."""
        tokenizer = self.classifier.tokenizer
        if tokenizer.chat_template is None or not answer.messages:
            return answer.prompt + answer.response
        said = [*answer.messages, {"role": "assistant", "content": answer.response.strip()}]
        return tokenizer.apply_chat_template(said, tokenize=False)

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Its scores."""
        judge, texts = self.classifier, [self.text(answer) for answer in answers]
        # A chat template writes the special tokens itself.
        special = judge.tokenizer.chat_template is None
        whole = judge.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        self.cut += sum(len(ids) > judge.max_tokens for ids in whole)
        return judge.scores(texts, special=special).tolist()
