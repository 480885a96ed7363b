"""How a measurement went over stored runs: levels, the steps between them, and the noise around them.

Times of one case on one machine are a level with noise, until a change of the code, a version or the machine
moves the level. A level is fitted to each stretch of runs so that

    sum over runs of ((log value - level of its stretch) / noise)^2  +  penalty * number of steps

is least, over all ways to cut the runs into stretches of two or more. Before, a value further than 2.5 times
the noise from the median of its two neighbours on either side is drawn in to there, so that one bad run is no
step. The noise is a robust scale of the differences from run to run, which a step leaves alone, mixed with
the uncertainty of the runs' own medians while there are few. The penalty, 5 log(n) (1 + 10 / n), was found by
simulation: of series without a step (normal, Laplace, exponential, and normal with one run in ten far off;
5 to 100 runs) it calls 0 to 4 % stepped. A step of less than 2 % is not called.

Figures of compilers and counters (`budget --out`) have no noise: every change is a step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rlhf_kernels.engine import stats
from rlhf_kernels.engine.results import Entry, Machine
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.show import short

LEAST_STEP = 1.02
SHORTEST = 2
# Fewer runs than two stretches need: nothing can be said.
FEWEST = 2 * SHORTEST
_LEAST_NOISE = 0.005
_DRAWN_IN = 2.5
_NEIGHBOURS = 2

Value = Callable[[Row], tuple[float, float, float] | None]


def _time(row: Row) -> tuple[float, float, float] | None:
    return (row.median_us, *(row.ci_us or (row.median_us,) * 2)) if row.median_us else None


def _speedup(row: Row) -> tuple[float, float, float] | None:
    return (row.speedup, *(row.speedup_ci or (row.speedup,) * 2)) if row.speedup else None


def _share(row: Row) -> tuple[float, float, float] | None:
    return (row.roof_fraction,) * 3 if row.roof_fraction else None


def _figure(name: str) -> Value:
    def value(row: Row) -> tuple[float, float, float] | None:
        found = row.figures.get(name)
        return (found,) * 3 if found else None

    return value


# Of a compiler or counter: any change is a step.
EXACT = ("instructions", "registers")
# What is followed: a value with its interval, and whether more of it is slower. The machine's drift is in a
# time, and cancels in what is measured against something of the same rounds.
METRICS: dict[str, tuple[Value, bool]] = {
    "time": (_time, True),
    "speedup": (_speedup, False),
    "roof": (_share, False),
    **{name: (_figure(name), True) for name in EXACT},
}


@dataclass(frozen=True)
class Point:
    """One run of a series: value and interval, and the run it is of."""

    number: int
    started: str
    value: float
    low: float
    high: float
    fingerprint: dict[str, Any]

    @property
    def commit(self) -> str:
        """Short, with a + where changes were not committed."""
        found = self.fingerprint
        return (found.get("commit") or "")[:7] + "+" * bool(found.get("dirty"))


@dataclass(frozen=True)
class Step:
    """A change of level.

    Attributes:
        at: index of the first point behind it.
        before, after: the levels.
        verdict: slower or faster.
        changed: what differs in the fingerprints of the runs on either side, as 'torch 2.12 to 2.13'.
    """

    at: int
    before: float
    after: float
    verdict: str
    changed: tuple[str, ...]

    @property
    def percent(self) -> float:
        """Change of the value in percent."""
        return (self.after / self.before - 1) * 100

    def shown(self, sign: str = "") -> str:
        """'12 %' or '0.34 %'; with '+' or '-' in front where `sign` is '+'."""
        value = self.percent if sign else abs(self.percent)
        return f"{value:{sign}.0f} %" if abs(value) >= 10 else f"{value:{sign}.2g} %"


@dataclass
class Series:
    """One measurement on one machine over time.

    Attributes:
        key: op, case, dtype, direction, implementation and device.
        machine: its title.
        metric: one of METRICS.
        points: oldest first.
        noise: relative scatter of a run around its level, one standard deviation.
        levels: (first point, one past the last, level) of each stretch.
        steps: between the stretches.
    """

    key: tuple[str, ...]
    machine: str
    metric: str
    points: list[Point]
    noise: float = 0.0
    levels: list[tuple[int, int, float]] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def told(self) -> str:
        """The steps in a sentence each."""
        if len(self.points) < FEWEST and self.metric not in EXACT:
            return f"{len(self.points)} runs: too few to tell."
        if not self.steps:
            return f"No step in {len(self.points)} runs."
        return " ".join(
            f"{step.verdict.capitalize()} by {step.shown()} from run "
            f"#{self.points[step.at].number} ({', '.join(step.changed) or 'nothing else changed'})."
            for step in self.steps
        )

    @property
    def title(self) -> str:
        """'swiglu small fwd native'."""
        op, case, dtype, direction, impl, device = self.key
        where = f"{dtype} {short(direction)}" if direction else device
        return f"{op} {case} {where}, {impl}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        names = ("op", "case", "dtype", "direction", "impl", "device")
        return dict(zip(names, self.key)) | {
            "machine": self.machine, "metric": self.metric, "noise": self.noise,
            "enough": len(self.points) >= FEWEST,
            "points": [
                {"run": p.number, "started": p.started, "commit": p.commit, "value": p.value,
                 "interval": [p.low, p.high]}
                for p in self.points
            ],
            "levels": [{"first": a, "stop": b, "level": level} for a, b, level in self.levels],
            "steps": [
                {"run": self.points[s.at].number, "before": s.before, "after": s.after,
                 "percent": s.percent, "verdict": s.verdict, "changed": list(s.changed)}
                for s in self.steps
            ],
        }  # fmt: skip


def series(machines: Iterable[Machine], metric: str = "time") -> list[Series]:
    """Every measurement that was taken more than once, with its steps, by op and case."""
    value, _ = METRICS[metric]
    found = []
    for machine in machines:
        runs: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
        for entry in machine.entries():
            if value(entry.row):
                # A speed-up over something else is something else.
                own = (entry.row.baseline,) if metric == "speedup" else ()
                runs[(*entry.row.key, *own)].append(entry)
        for key, entries in sorted(runs.items(), key=lambda item: tuple(map(str, item[0]))):
            if len(entries) > 1:
                points = [Point(e.number, e.run.started, *value(e.row), e.run.fingerprint) for e in entries]
                found.append(fitted(Series(key[:6], machine.title, metric, points)))
    return found


def fitted(one: Series) -> Series:
    """The same series with noise, levels and steps filled in."""
    if one.metric in EXACT:
        cuts = [i for i, (a, b) in enumerate(pairwise(one.points), 1) if a.value != b.value]
        one.levels = _levels(one.points, cuts)
    else:
        cuts = _noisy(one)
    _, more_is_slower = METRICS[one.metric]
    one.steps = [
        Step(
            at, before, after, "slower" if (after > before) == more_is_slower else "faster",
            _changed(one.points[at - 1].fingerprint, one.points[at].fingerprint),
        )
        for at, (*_, before), (*_, after) in zip(cuts, one.levels, one.levels[1:])
    ]  # fmt: skip
    return one


def _noisy(one: Series) -> list[int]:
    """Fills in noise and levels of what scatters; returns where levels change."""
    logs = [math.log(p.value) for p in one.points]
    own = stats.median([math.log(p.high / p.low) / 2 / 1.96 for p in one.points])
    one.noise = noise(logs, own)
    cuts = changes(logs, one.noise)
    one.levels = _levels(one.points, cuts)
    # A step too small to matter is taken back, and its stretches are one.
    while small := [
        cut for cut, (*_, a), (*_, b) in zip(cuts, one.levels, one.levels[1:])
        if max(a / b, b / a) < LEAST_STEP
    ]:  # fmt: skip
        cuts.remove(small[0])
        one.levels = _levels(one.points, cuts)
    return cuts


def _levels(points: Sequence[Point], cuts: Sequence[int]) -> list[tuple[int, int, float]]:
    ends = [0, *cuts, len(points)]
    return [(a, b, stats.median([p.value for p in points[a:b]])) for a, b in pairwise(ends)]


def noise(logs: Sequence[float], own: float = 0.0) -> float:
    """Standard deviation of a run around its level.

    Args:
        logs: the values' logarithms.
        own: what the runs say of their own uncertainty. Where it is the larger, it counts as much as four
            differences between neighbours: two runs that agree by chance do not make it go away, many do.
    """
    differences = [abs(b - a) for a, b in pairwise(logs)]
    scatter = 1.4826 * stats.median(differences) / math.sqrt(2) if differences else 0.0
    n, prior = len(differences), 4
    mixed = math.sqrt((n * scatter**2 + prior * max(own, scatter) ** 2) / (n + prior))
    return max(mixed, _LEAST_NOISE)


def changes(logs: Sequence[float], scale: float) -> list[int]:
    """Indices at which a new level begins; the formula stands at the top of this file.

    Args:
        logs: the values' logarithms, oldest first.
        scale: their noise.
    """
    n = len(logs)
    if n < FEWEST:
        return []
    calm = [_drawn_in(logs, i, scale) / scale for i in range(n)]
    sums, squares = [0.0], [0.0]
    for value in calm:
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value * value)
    penalty = 5 * math.log(n) * (1 + 10 / n)
    best, start = [-penalty] + [math.inf] * n, [0] * (n + 1)
    for stop in range(SHORTEST, n + 1):
        for first in range(stop - SHORTEST + 1):
            spread = squares[stop] - squares[first] - (sums[stop] - sums[first]) ** 2 / (stop - first)
            if best[first] + spread + penalty < best[stop]:
                best[stop], start[stop] = best[first] + spread + penalty, first
    cuts, at = [], n
    while (at := start[at]) > 0:
        cuts.append(at)
    return cuts[::-1]


def _drawn_in(logs: Sequence[float], i: int, scale: float) -> float:
    middle = stats.median(logs[max(0, i - _NEIGHBOURS) : i + _NEIGHBOURS + 1])
    return min(max(logs[i], middle - _DRAWN_IN * scale), middle + _DRAWN_IN * scale)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """What differs between two fingerprints; a build is named, its identity helps nobody."""
    found = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if old == new or name == "dirty":
            continue
        if name == "commit":
            found.append(f"commit {(old or '?')[:7]} to {(new or '?')[:7]}")
        elif isinstance(old, dict) or isinstance(new, dict):
            found.append(name)
        else:
            found.append(f"{name} {old} to {new}")
    return tuple(found)
