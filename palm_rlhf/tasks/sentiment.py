"""Sentences with a sentiment: SST-2's file, and a judge that counts words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from palm_rlhf.tasks.pairs import Labelled
from palm_rlhf.tasks.text import read_lines


def read_sst2(path: str | Path) -> list[Labelled]:
    """Sentences of SST-2 with label 1 for positive and 0 for negative: `sentence <tab> label` lines.

    Socher et al., 2013, "Recursive deep models for semantic compositionality over a sentiment treebank";
    Wang et al., 2018, arXiv:1804.07461 (GLUE). The heading line of GLUE's own file is left out.

    Raises:
        ValueError: a line is something else; its number is named.
    """
    found = []
    for number, line in enumerate(read_lines(path), 1):
        text, tab, label = line.rpartition("\t")
        if number == 1 and (text, label) == ("sentence", "label"):
            continue
        if not tab or label not in ("0", "1") or not text.strip():
            raise ValueError(
                f"{path}, line {number}: expected a sentence, a tab and 0 or 1, got {line[:60]!r}"
            )
        found.append(Labelled(text.strip(), float(label)))
    return found


def parts(examples: Sequence[Labelled], shares: Sequence[float], seed: int = 0) -> tuple[list[Labelled], ...]:
    """Disjoint random parts of these shares, which add up to 1; the last takes what rounding leaves.

    Raises:
        ValueError: the shares do not add up to 1, or a part is empty.
    """
    if not math.isclose(sum(shares), 1.0):
        raise ValueError(f"shares must add up to 1, got {list(shares)}")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = [round(len(order) * sum(shares[: i + 1])) for i in range(len(shares) - 1)]
    found = tuple(
        [examples[i] for i in order[start:end]] for start, end in zip((0, *ends), (*ends, len(order)))
    )
    if not all(found):
        raise ValueError(f"shares {list(shares)} of {len(examples)} examples leave a part empty")
    return found


class NaiveBayes:
    """Which of two classes a text is of, by its words and pairs of neighbours: log P(1 | text) / P(0 | text).

    Counts with add-one smoothing and each feature once a text, as in Wang and Manning, 2012, "Baselines and
    bigrams". It has no gradient and no network: a policy that learns from a network's reward cannot have
    learned this judge's weaknesses.
    """

    def __init__(self, examples: Iterable[Labelled], smoothing: float = 1.0) -> None:
        """
        Args:
            examples: texts with labels 0 and 1. smoothing: added to every count.

        Raises:
            ValueError: a label is neither 0 nor 1, a class has no text, or smoothing is not above 0.
        """
        if not smoothing > 0:
            raise ValueError(f"NaiveBayes: smoothing must be above 0, got {smoothing}")
        counts, texts = (Counter(), Counter()), [0, 0]
        for example in examples:
            if example.label not in (0, 1):
                raise ValueError(
                    f"NaiveBayes: labels are 0 or 1, got {example.label:g} for {example.text[:60]!r}"
                )
            counts[int(example.label)].update(set(features(example.text)))
            texts[int(example.label)] += 1
        if not all(texts):
            raise ValueError(f"NaiveBayes: both classes need texts, got {texts[0]} of 0 and {texts[1]} of 1")
        vocabulary = counts[0].keys() | counts[1].keys()
        total = [sum(c.values()) + smoothing * len(vocabulary) for c in counts]
        self.prior = math.log(texts[1] / texts[0])
        self.weights = {
            feature: math.log((counts[1][feature] + smoothing) / total[1])
            - math.log((counts[0][feature] + smoothing) / total[0])
            for feature in vocabulary
        }

    def __call__(self, text: str) -> float:
        """The log odds of class 1; features that no example had say nothing."""
        return self.prior + sum(self.weights.get(feature, 0.0) for feature in sorted(set(features(text))))

    def accuracy(self, examples: Sequence[Labelled]) -> float:
        """Share of texts whose class it finds."""
        return sum((self(e.text) > 0) == bool(e.label) for e in examples) / len(examples)


def features(text: str) -> Iterator[str]:
    """Words in lower case, and pairs of neighbours."""
    words = text.lower().split()
    yield from words
    yield from (f"{a} {b}" for a, b in pairwise(words))
