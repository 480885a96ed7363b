"""Rewards that read texts: words with weights, a classifier of sentiment, rules; called (prompt, response).

`ProgrammaticReward` makes a reward of any; `text_reward` makes one of a name, as `--reward` takes it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from palm_rlhf.tasks.sentiment import NaiveBayes, read_sst2
from palm_rlhf.tasks.text import read_lines, read_text

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# Kinds of rewards that have a name, and what follows its colon.
NAMES = {
    "lexicon": "a file of words with weights",
    "sentiment": "a file of texts with labels 0 and 1",
    "matches": "a regular expression",
    "lacks": "a regular expression",
    "words": "bounds such as 5-20",
    "characters": "bounds such as 5-20",
}


class Lexicon:
    """The mean weight of a text's words: those that are not in the lexicon count with 0.

    Negation is not understood. A text without words gets 0.
    """

    def __init__(self, weights: Mapping[str, float] | str | Path, *, whole: bool = False) -> None:
        """
        Args:
            weights: of words in lower case; or a file: JSON {"word": weight}, or lines of a word, a tab and a
                weight (VADER's further columns are left out).
            whole: score prompt and response together, not the response alone.

        Raises:
            ValueError: there are no words, or a weight is no finite number.
        """
        found = weights if isinstance(weights, Mapping) else _lexicon(Path(weights))
        if not found:
            raise ValueError("Lexicon: there are no words in it")
        self.weights = {word.lower(): _weight(word, weight) for word, weight in found.items()}
        self.whole = whole

    def __call__(self, prompt: str, response: str) -> float:
        """The mean."""
        words = _WORD.findall((prompt + response if self.whole else response).lower())
        return sum(self.weights.get(word, 0.0) for word in words) / max(1, len(words))


class Sentiment:
    """The log-odds of label 1 by a Naive Bayes classifier, for prompt and response together.

    `limit` bounds it on both sides: more of the same words is no better then.
    """

    def __init__(self, judge: Callable[[str], float] | str | Path, *, limit: float | None = 10.0) -> None:
        """`judge` gives log-odds of a text, or is a file of labelled texts as `read_sst2` takes.

        ValueError where the file is another, or `limit` is not above 0.
        """
        self.judge = NaiveBayes(read_sst2(judge)) if isinstance(judge, (str, Path)) else judge
        if limit is not None and not limit > 0:
            raise ValueError(f"Sentiment: limit must be above 0 or None, got {limit}")
        self.limit = math.inf if limit is None else limit

    def __call__(self, prompt: str, response: str) -> float:
        """The log-odds, at most `limit`."""
        return max(-self.limit, min(self.limit, self.judge(prompt + response)))


class Matches:
    """`reward` where a regular expression matches somewhere in the response, else `otherwise`."""

    def __init__(self, pattern: str, *, reward: float = 1.0, otherwise: float = 0.0) -> None:
        """ValueError for a pattern that is no regular expression."""
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        self.reward, self.otherwise = reward, otherwise

    def __call__(self, prompt: str, response: str) -> float:
        """One of the two."""
        return self.reward if self.pattern.search(response) else self.otherwise


class Length:
    """0 for `least` to `most` words or characters; `cost` less for each that is missing or too many."""

    def __init__(
        self, least: int = 0, most: int | None = None, *, unit: str = "words", cost: float = 1.0
    ) -> None:
        """ValueError where `least` is above `most`, or `unit` is neither 'words' nor 'characters'."""
        if unit not in ("words", "characters"):
            raise ValueError(f"Length: unit must be 'words' or 'characters', got {unit!r}")
        if least < 0 or (most is not None and most < least):
            raise ValueError(f"Length: expected 0 <= least <= most, got {least} and {most}")
        self.least, self.most, self.unit, self.cost = least, most, unit, cost

    def __call__(self, prompt: str, response: str) -> float:
        """0 or less."""
        count = len(response.split() if self.unit == "words" else response)
        over = 0 if self.most is None else max(0, count - self.most)
        return -self.cost * (max(0, self.least - count) + over)


def text_reward(name: str) -> Callable[[str, str], float] | None:
    """The reward of a name such as "lexicon:words.tsv"; None where it is of another kind.

    Raises:
        ValueError: what follows the colon does not fit, or the file cannot be read.
    """
    kind, colon, what = name.partition(":")
    if not colon or kind not in NAMES:
        return None
    if not what:
        raise ValueError(f"the reward {name!r} needs {NAMES[kind]} after the colon")
    if kind == "lexicon":
        return Lexicon(what)
    if kind == "sentiment":
        return Sentiment(what)
    if kind in ("matches", "lacks"):
        return Matches(what, reward=float(kind == "matches"), otherwise=float(kind == "lacks"))
    found = re.fullmatch(r"(\d*)-(\d*)", what)
    if not found or what == "-":
        raise ValueError(f"the reward {name!r} needs bounds, as in {kind}:5-20, {kind}:5- or {kind}:-20")
    return Length(int(found[1] or 0), int(found[2]) if found[2] else None, unit=kind)


def _lexicon(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        try:
            found = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error.msg} in line {error.lineno}") from error
        if not isinstance(found, dict):
            raise ValueError(f'{path} must hold {{"word": weight, ...}}, got {type(found).__name__}')
        return found
    weights = {}
    for number, line in enumerate(read_lines(path), 1):
        word, *columns = line.split("\t")
        try:
            weights[word.strip()] = float(columns[0])
        except (IndexError, ValueError):
            raise ValueError(
                f"{path}, line {number}: expected a word, a tab and a number, got {line[:60]!r}"
            ) from None
    return weights


def _weight(word: str, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"Lexicon: the weight of {word!r} must be a finite number, got {weight!r}")
    return float(weight)
