"""Statistics of timings: the median and what can be said of it without assuming a distribution."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

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
