"""What a model is worth: perplexity, accuracy of rewards, win rate, KL divergence, diversity, length.

Shares have Wilson's interval, means the normal one, at 95 %. Responses to one prompt are alike, so that
prompts are counted, not responses: intervals are then rather too wide than too narrow.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from palm_rlhf.models.protocol import CausalModel
from palm_rlhf.models.value import Policy
from palm_rlhf.padding import side_by_side
from palm_rlhf.pipeline.sampling import Prompt, Sampler, SamplingOptions, sample_rows
from palm_rlhf.pipeline.scoring import Answer, Scorer, answers_of
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.tasks.text import Samples, lines
from palm_rlhf.tokens import Tokenizer

# Of the normal distribution, for 95 %.
_Z = 1.959964
# (prompt, first, second) -> probability, from 0 to 1, that the first is better.
Judge = Callable[[str, str, str], float]


class Interval(NamedTuple):
    """An estimate with its 95 % interval, and how many things it is of."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int) -> Interval:
    """A share with Wilson's score interval; halves count as such. ValueError for a share of nothing.

    Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a share is of at least one thing, got {successes} of {n}")
    share, z2 = successes / n, _Z * _Z / n
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    # At the ends rounding must not put the estimate outside.
    return Interval(share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share), n)


def mean_interval(values: Sequence[float]) -> Interval:
    """A mean with its normal interval; of a single value that has no width."""
    mean = statistics.fmean(values)
    half = _Z * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Interval(mean, mean - half, mean + half, len(values))


def distinct(texts: Iterable[str], n: int = 2) -> float:
    """Distinct-n (Li et al., 2016, arXiv:1510.03055): share of different ones among all n-grams of words.

    It falls the more text there is: compare equal amounts (`first_words`). NaN where there is no n-gram.
    """
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        grams.update(zip(*(words[i:] for i in range(n))))
    return len(grams) / grams.total() if grams else math.nan


def first_words(texts: Iterable[str], words: int) -> Iterator[str]:
    """The texts up to so many words over all."""
    for text in texts:
        parts = text.split()[:words]
        words -= len(parts)
        yield " ".join(parts)


def word_count(texts: Iterable[str]) -> int:
    """Words of all texts."""
    return sum(len(text.split()) for text in texts)


@torch.no_grad()
def perplexity(
    model: CausalModel,
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    *,
    stop: int | None = None,
    length: int = 128,
    batch: int = 16,
    scope: str | None = None,
) -> dict[str, float]:
    """How well a model foresees a text. A window's first token is given, not foreseen.

    Args:
        model: dropout is off as long as this takes. tokenizer: makes the tokens.
        text: one, in windows of `length` + 1 tokens that overlap by one; or lines, with `stop` behind each.
        stop: ends a line; the tokenizer's by default.
        length: tokens that a window foresees, or of a line at most. batch: windows in one forward pass.
        scope: adapters.

    Returns:
        perplexity (per token), nats_per_token, bits_per_byte (which tokenizers share) and tokens.

    Raises:
        ValueError: there is no token to foresee, or a line is too long.
    """
    if isinstance(text, str):
        samples = _windows(tokenizer.encode(text), length, tokenizer.pad)
        first = samples.stream[:1].tolist()
        size = len(text.encode()) - len(tokenizer.decode(first).encode())
    else:
        samples = lines(text, tokenizer, stop=stop, length=length)
        firsts = samples.stream[samples.starts].tolist()
        size = sum(len(line.encode()) for line in text)
        size -= sum(len(tokenizer.decode([token]).encode()) for token in firsts)
    policy, training = Policy(model, scope), model.training
    total, count = 0.0, 0
    model.eval()
    try:
        for index in torch.arange(len(samples)).split(batch):
            tokens, mask = samples.batch(index)
            learned = samples.learned(index, mask)[:, 1:]
            found = policy(tokens.to(model.device), mask.to(model.device), 1)[0].double().cpu()
            total -= float(found[learned].sum())
            count += int(learned.sum())
    finally:
        model.train(training)
    return {
        "perplexity": math.exp(min(total / count, 700.0)),
        "nats_per_token": total / count,
        "bits_per_byte": total / math.log(2) / size if size > 0 else math.nan,
        "tokens": count,
    }


def _windows(ids: list[int], length: int, pad: int) -> Samples:
    """All of a text: unlike those to train on, the last window may be shorter."""
    if length < 1 or len(ids) < 2:
        raise ValueError(
            f"perplexity needs 2 tokens of text and windows of at least 1, got {len(ids)} and {length}"
        )
    starts = torch.arange(0, len(ids) - 1, length)
    lengths = (len(ids) - starts).clamp(max=length + 1)
    return Samples(torch.tensor(ids, dtype=torch.int32), starts, lengths, pad)


class Drawn(NamedTuple):
    """Responses of a model, neighbours answering the same prompt.

    Attributes:
        answers: P * samples of them.
        samples: to each prompt.
        stopped: whether each came to a stop.
    """

    answers: list[Answer]
    samples: int
    stopped: list[bool]

    def by_prompt(self, values: Sequence[float]) -> list[float]:
        """Means of values, one for each answer, over the answers to each prompt."""
        n = self.samples
        return [statistics.fmean(values[i : i + n]) for i in range(0, len(values), n)]


def draw(
    prompts: Sequence[Prompt],
    sampler: Sampler,
    tokenizer: Tokenizer,
    options: SamplingOptions,
    *,
    samples: int,
    seed: int,
    stop: int,
    batch: int = 16,
    advance: Callable[..., None] | None = None,
) -> Drawn:
    """Responses as `palm-rlhf sample` draws them, kept in memory; `advance({}, n)` after n prompts more."""
    rows: list[dict[str, Any]] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        rows += sample_rows(part, sampler, tokenizer, options, samples=samples, seed=seed, stop=stop)
        if advance is not None:
            advance({}, len(part))
    return Drawn(answers_of(rows), samples, [value for row in rows for value in row["stopped"]])


def kl_divergence(
    drawn: Drawn,
    model: CausalModel,
    reference: CausalModel,
    *,
    pad: int,
    temperature: float = 1.0,
    batch: int = 16,
) -> Interval:
    """KL(model || reference) in nats of a whole response, from responses that the model drew.

    Over each token's whole vocabulary, summed along a response: the mean log-ratio of what was drawn has the
    same expectation and a far wider interval. Unbiased where nothing was truncated and `temperature` is the
    sampler's; never below 0.
    """
    mine, theirs, found = Policy(model), Policy(reference), list[float]()
    for start in range(0, len(drawn.answers), batch):
        part = drawn.answers[start : start + batch]
        tokens, mask, width = side_by_side(
            [answer.prompt_tokens for answer in part], [answer.tokens for answer in part], pad
        )
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        found += mine.divergence(theirs, tokens, mask, width, temperature).double().sum(1).tolist()
    return mean_interval(drawn.by_prompt(found))


def reward_accuracy(scorer: Scorer, pairs: Sequence[Pair]) -> Interval:
    """Share of pairs whose chosen response has the higher score; equal scores count half."""
    answers = [_as_answer(pair, which) for pair in pairs for which in (0, 1)]
    scores = scorer(answers)
    return wilson(sum(_better(a, b) for a, b in zip(scores[::2], scores[1::2])), len(pairs))


def _as_answer(pair: Pair, which: int) -> Answer:
    """The chosen response (0) or the rejected one (1)."""
    messages = [{"role": "user", "content": pair.prompt}] if pair.prompt else []
    prompt, *responses = pair.tokens or ((), (), ())
    return Answer(messages, pair.prompt, (pair.chosen, pair.rejected)[which], prompt, responses[which])


def _better(one: float, other: float) -> float:
    return 0.5 if one == other else float(one > other)


def win_rate(ours: Sequence[float], theirs: Sequence[float], samples: int = 1) -> Interval:
    """Share of comparisons that ours win by their scores, neighbours of `samples` answering one prompt."""
    return _won([_better(a, b) for a, b in zip(ours, theirs, strict=True)], samples)


def judged_win_rate(judge: Judge, ours: Drawn, theirs: Drawn) -> tuple[Interval, float]:
    """The same under a judge who sees two responses, and the share of comparisons where the order decided.

    Every pair is shown in both orders, and what it says of them is averaged: a judge who prefers the first
    whatever it is gives everyone one half.

    Raises:
        ValueError: it gives anything but a number from 0 to 1.
    """
    won, swayed = [], 0
    for mine, other in zip(ours.answers, theirs.answers, strict=True):
        forward = _verdict(judge, mine.question, mine.response, other.response)
        backward = 1 - _verdict(judge, mine.question, other.response, mine.response)
        won.append((forward + backward) / 2)
        swayed += (forward - 0.5) * (backward - 0.5) < 0
    return _won(won, ours.samples), swayed / len(won)


def _verdict(judge: Judge, prompt: str, first: str, second: str) -> float:
    name = getattr(judge, "__name__", type(judge).__name__)
    found = judge(prompt, first, second)
    if isinstance(found, str) or not 0 <= float(found) <= 1:
        raise ValueError(
            f"the judge {name}() gave {found!r}: expected the chance, from 0 to 1, that the first is better"
        )
    return float(found)


def _won(values: Sequence[float], samples: int) -> Interval:
    shares = [statistics.fmean(values[i : i + samples]) for i in range(0, len(values), samples)]
    return wilson(sum(shares), len(shares))
