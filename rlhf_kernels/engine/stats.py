"""Statistics of timings: the median and what can be said of it without assuming a distribution.

Changes are logarithms of ratios: twice as slow and twice as fast are equally far from 0.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

median = statistics.median

# Of the normal distribution, for 95 %.
_Z = 1.959964


def median_ci(samples: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median by order statistics; least to largest below seven samples."""
    ordered = sorted(samples)
    n = len(ordered)
    half = _Z * math.sqrt(n) / 2
    low = max(1, round(n / 2 - half))
    high = min(n, round(n / 2 + half) + 1)
    return ordered[low - 1], ordered[high - 1]


def precision(samples: Sequence[float]) -> float:
    """Half the width of the median's interval over the median."""
    low, high = median_ci(samples)
    middle = median(samples)
    return (high - low) / 2 / middle if middle else 0.0


def paired(base: Sequence[float], head: Sequence[float]) -> list[float]:
    """base / head, round by round; the machine's drift is in both and cancels."""
    return [b / h for b, h in zip(base, head)]


def mad(samples: Sequence[float]) -> float:
    """Median absolute deviation from the median."""
    middle = median(samples)
    return median([abs(x - middle) for x in samples])


def ratio_ci(base: Sequence[float], head: Sequence[float], resamples: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of median(base) / median(head); the same samples give the same interval."""
    draw = random.Random(0)
    ratios = sorted(
        median(draw.choices(base, k=len(base))) / median(draw.choices(head, k=len(head)))
        for _ in range(resamples)
    )
    return ratios[round(0.025 * (resamples - 1))], ratios[round(0.975 * (resamples - 1))]


def midmean(samples: Sequence[float]) -> float:
    """The mean of the middle half: nearly as sharp as the mean, and deaf to a quarter of strays."""
    ordered = sorted(samples)
    cut = len(ordered) // 4
    return statistics.fmean(ordered[cut : len(ordered) - cut])


def quiet(samples: Sequence[float]) -> float:
    """The lower decile: what else runs on a machine only adds to a time."""
    return sorted(samples)[(len(samples) - 1) // 10]


def logarithms(values: Sequence[float]) -> list[float]:
    """Natural logarithms."""
    return [math.log(value) for value in values]


def midmean_ci(
    head: Sequence[float], base: Sequence[float] = (0.0,), level: float = 0.95, resamples: int = 1000
) -> tuple[float, float]:
    """The bootstrap interval of midmean(head) - midmean(base); the same input gives the same interval.

    With one sequence, of changes, the interval of their midmean. Percentiles of the resampled values (Efron
    and Tibshirani 1993, chapter 13).
    """
    draw = random.Random(0)
    values = sorted(
        midmean(draw.choices(head, k=len(head))) - midmean(draw.choices(base, k=len(base)))
        for _ in range(resamples)
    )
    tail = (1 - level) / 2 * (resamples - 1)
    return values[round(tail)], values[round(resamples - 1 - tail)]


def signed_rank(changes: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test that changes lie about 0; exact, ties and all.

    It holds whatever the distribution where the order within each pair was drawn by lot.
    """
    changes = [change for change in changes if change]
    ranks = _double_ranks([abs(change) for change in changes])
    ways = Counter({0: 1})
    for rank in ranks:
        ways += Counter({total + rank: count for total, count in ways.items()})
    return _two_sided(ways, sum(rank for rank, change in zip(ranks, changes) if change > 0))


def rank_sum(base: Sequence[float], head: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney test that both sides are alike; exact up to 20 samples, else normal."""
    ranks = _double_ranks([*base, *head])
    observed, n, m = sum(ranks[len(base) :]), len(base), len(head)
    if n + m <= 20:
        return _two_sided(_sums_of_some(tuple(sorted(ranks)), m), observed)
    # With ties the variance of the sum is that of m draws without replacement from the ranks.
    spread = math.sqrt(statistics.pvariance(ranks) * m * n / (n + m - 1))
    away = abs(observed - statistics.fmean(ranks) * m) - 1  # half a rank for continuity
    return math.erfc(max(away, 0.0) / spread / math.sqrt(2)) if spread else 1.0


def _double_ranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each value; equal ones share the mean of theirs, hence twice, to stay whole."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, before = [0] * len(values), 0
    for _, equal in groupby(order, key=values.__getitem__):
        indices = list(equal)
        for index in indices:
            ranks[index] = 2 * before + len(indices) + 1
        before += len(indices)
    return ranks


@lru_cache(maxsize=64)
def _sums_of_some(ranks: tuple[int, ...], count: int) -> Counter[int]:
    """How many ways there are to reach each sum with `count` of the ranks."""
    ways = [Counter({0: 1}), *(Counter() for _ in range(count))]
    for rank in ranks:
        for taken in range(count, 0, -1):
            ways[taken] += Counter({total + rank: number for total, number in ways[taken - 1].items()})
    return ways[count]


def _two_sided(ways: Counter[int], observed: int) -> float:
    low = sum(number for total, number in ways.items() if total <= observed)
    high = sum(number for total, number in ways.items() if total >= observed)
    return min(1.0, 2 * min(low, high) / ways.total())


def holm(chances: Sequence[float]) -> list[float]:
    """p values for many tests at once, so that all false alarms together stay below the level (Holm 1979)."""
    adjusted, worst = [0.0] * len(chances), 0.0
    for place, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        worst = max(worst, min(1.0, (len(chances) - place) * chances[index]))
        adjusted[index] = worst
    return adjusted


# Student's t for 99 % two-sided, by degrees of freedom.
_T99 = (
    63.657,
    9.925,
    5.841,
    4.604,
    4.032,
    3.707,
    3.499,
    3.355,
    3.250,
    3.169,
    3.106,
    3.055,
    3.012,
    2.977,
    2.947,
)


def repeat_limit(values: Sequence[float]) -> float:
    """How far one more value may lie from the mean of these: half the 99 % prediction interval.

    t(n - 1) s sqrt(1 + 1/n), exact for normal values; at least two are needed.
    """
    n = len(values)
    t = _T99[min(n - 1, len(_T99)) - 1]
    return t * statistics.stdev(values) * math.sqrt(1 + 1 / n)
