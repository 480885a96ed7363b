"""From scored responses to pairs: what is dropped and why, the best and the worst, a share that judges."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palm_rlhf.tasks.pairs import split_groups


@dataclass(frozen=True)
class PairOptions:
    """Which responses, and which prompts, make a pair."""

    max_prompt_tokens: int | None = 1024
    """Longer prompts are dropped; None: none is."""
    max_response_tokens: int | None = 2048
    """Longer responses are dropped; None: none is."""
    unfinished: bool = True
    """Keep responses that came to no stop token."""
    min_margin: float = 0.0
    """Drop pairs whose scores differ by no more than this."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_margin) and self.min_margin >= 0):
            raise ValueError(f"min_margin must be at least 0, got {self.min_margin}")


# Reasons to drop a response, and to drop a prompt, in the order in which they are looked for.
RESPONSE_REASONS = ("over-long", "empty", "unfinished", "duplicate")
PROMPT_REASONS = ("over-long prompt", "fewer than two responses left", "scores too close")


def choose(
    rows: Iterable[Mapping[str, Any]], options: PairOptions
) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """The best and the worst response to each prompt, and how many responses and prompts went, by reason.

    Of equal scores the first counts. A duplicate is a response with the text of an earlier one.
    """
    responses, prompts = (
        Counter(dict.fromkeys(RESPONSE_REASONS, 0)),
        Counter(dict.fromkeys(PROMPT_REASONS, 0)),
    )
    found = []
    for row in rows:
        if options.max_prompt_tokens is not None and len(row["prompt_tokens"]) > options.max_prompt_tokens:
            prompts["over-long prompt"] += 1
            continue
        kept = _kept(row, options, responses)
        if len(kept) < 2:
            prompts["fewer than two responses left"] += 1
            continue
        scores = row["scores"]
        best, worst = max(kept, key=scores.__getitem__), min(kept, key=scores.__getitem__)
        if not scores[best] - scores[worst] > options.min_margin:
            prompts["scores too close"] += 1
            continue
        found.append(_pair(row, best, worst))
    return found, {"responses": dict(responses), "prompts": dict(prompts)}


def _kept(row: Mapping[str, Any], o: PairOptions, dropped: Counter[str]) -> list[int]:
    kept, seen = [], set()
    for index, (text, tokens) in enumerate(zip(row["responses"], row["response_tokens"])):
        if o.max_response_tokens is not None and len(tokens) > o.max_response_tokens:
            reason = "over-long"
        elif not tokens:
            reason = "empty"
        elif not (o.unfinished or row["stopped"][index]):
            reason = "unfinished"
        elif text in seen:
            reason = "duplicate"
        else:
            seen.add(text)
            kept.append(index)
            continue
        dropped[reason] += 1
    return kept


def _pair(row: Mapping[str, Any], best: int, worst: int) -> dict[str, Any]:
    """A line of `palm-rlhf train NAME --pairs`."""
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "chosen": row["responses"][best],
        "rejected": row["responses"][worst],
        "margin": row["scores"][best] - row["scores"][worst],
        "chosen_score": row["scores"][best],
        "rejected_score": row["scores"][worst],
        "messages": row["messages"],
        "prompt_tokens": row["prompt_tokens"],
        "chosen_tokens": row["response_tokens"][best],
        "rejected_tokens": row["response_tokens"][worst],
        "chosen_logprob": row["logprobs"][best],
        "rejected_logprob": row["logprobs"][worst],
    }


def split(
    pairs: Sequence[dict[str, Any]], test: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs to train on and pairs to judge by; those with the same prompt stay together.

    Args:
        pairs: lines.
        test: a share below 1, or a number of pairs; 0: none.
        seed: of the choice.

    Raises:
        ValueError: one side would be empty.
    """
    if test < 0:
        raise ValueError(f"--test is a share below 1 or a number of pairs, got {test}")
    if not test:
        return list(pairs), []
    count = round(test) if test >= 1 else max(1, round(test * len(pairs)))
    if count >= len(pairs):
        raise ValueError(
            f"--test {test:g} of {len(pairs)} pairs leaves none to train on. --test 0 splits off none."
        )
    sides = split_groups([line["prompt"] for line in pairs], count / len(pairs), seed)
    return tuple([pairs[index] for index in side] for side in sides)
