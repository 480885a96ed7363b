"""Two results, row by row: faster, slower, same, inconclusive or missing.

A change is called only when it is all of these:

- statistical: the 95 % bootstrap interval of the logarithm of head's time over base's leaves out 0, and a
  rank test says so too, corrected for the number of rows (Holm);
- practical: larger than the noise floor of this row, which repeated runs of the same code show, and than 2 %;
- absolute: larger than 0.1 us.

`same` says that the interval lies within the floor; what is neither is `inconclusive`. A row that head lost,
or that is no longer ok there, is `missing` and fails.

The unit is the process: samples of one process share its memory layout and its minute. Two runs of one
session, as `regress` makes them, were measured by turns: their samples pair up round by round, and the
changes of the processes are ranked by sign (Wilcoxon). Runs from different times are compared by the
processes' quiet times (Mann-Whitney), and since a rank test knows nothing of the hour, they need repeated
runs of base (`bench --save-baseline NAME --runs 5`): the floor is then the 99 % prediction interval of one
more run.

Figures of `budget` are exact: no statistics, no floor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rlhf_kernels.engine import stats
from rlhf_kernels.engine.bench import merged
from rlhf_kernels.engine.budget.ledger import excess
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.store import Run
from rlhf_kernels.engine.table import share
from rlhf_kernels.runtime.dispatch import BACKENDS

Verdict = Literal["faster", "slower", "same", "inconclusive", "missing"]
VERDICTS: tuple[Verdict, ...] = ("missing", "slower", "inconclusive", "faster", "same")
Key = tuple[str, ...]

# What two timings must share; for figures of `budget` only the compilers count.
_ALIKE = (
    "device", "processor", "flags", "isa", "cores", "threads", "system", "python", "torch", "triton", "cuda",
    "gpu", "driver", "power_limit", "clock_max",
)  # fmt: skip


class Unlike(ValueError):
    """Results of different machines, versions or compilers; the text names what differs."""


@dataclass(frozen=True)
class Gate:
    """What a change must pass to be called one.

    Attributes:
        level: of all false alarms of one comparison together.
        least: relative change below which nothing is called.
        absolute_us: the same in microseconds.
        unknown: noise floor of runs from different times where no repeated runs show it.
        blind: where noise makes as much as this, nothing is called `same`.
    """

    level: float = 0.05
    least: float = 0.02
    absolute_us: float = 0.1
    unknown: float = 0.10
    blind: float = 0.10


@dataclass
class Comparison:
    """One row of base against the row of head with the same key.

    Attributes:
        verdict, reason: what is said of it, and why in a few words.
        status: head's, which is what a missing row became.
        base_us, head_us: medians.
        ratio, ratio_ci: head's time over base's, and its 95 % interval.
        p: of the rank test, corrected for all rows.
        floor: relative change that noise alone may make.
        processes: of base and of head.
        figures: name -> (base, head) of a budget.
    """

    op: str
    impl: str
    case: str
    dtype: str
    direction: str
    device: str
    verdict: Verdict = "inconclusive"
    reason: str = ""
    status: str = "ok"
    base_us: float | None = None
    head_us: float | None = None
    ratio: float | None = None
    ratio_ci: tuple[float, float] | None = None
    p: float | None = None
    floor: float | None = None
    processes: tuple[int, int] = (0, 0)
    figures: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        """Whether the change exceeds the floor, called or not."""
        return self.ratio is not None and max(self.ratio, 1 / self.ratio) - 1 > self.floor

    @property
    def doubtful(self) -> bool:
        """Whether more processes may well call a change: it exceeds the floor, and two thirds of the interval
        leave out 0, which happens once in five times where there is none."""
        if self.verdict != "inconclusive" or not self.changed:
            return False
        middle = math.log(self.ratio)
        nearest = math.log(self.ratio_ci[0] if middle > 0 else self.ratio_ci[1])
        return abs(middle) > 2 / 3 * abs(middle - nearest)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass
class Report:
    """All comparisons of two results, and what else a reader must know."""

    rows: list[Comparison]
    notes: list[str] = field(default_factory=list)
    gate: Gate = field(default_factory=Gate)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by verdict, the worst first."""
        return {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in VERDICTS}

    @property
    def geometric_mean(self) -> float | None:
        """Of head's time over base's, over all rows with times."""
        ratios = [row.ratio for row in self.rows if row.ratio]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "counts": self.counts, "geometric_mean": self.geometric_mean, "gate": asdict(self.gate),
            "notes": self.notes, "rows": [row.to_json() for row in self.rows],
        }  # fmt: skip


@dataclass
class Series:
    """What a file knows of one measurement: its rows in the runs of the last session that has it."""

    rows: list[Row]
    run: Run

    @property
    def row(self) -> Row:
        """All runs as one."""
        return merged(self.rows)


def series(runs: Iterable[Run]) -> dict[Key, Series]:
    """The latest of each measurement; runs of one session are of the same code and stay together."""
    found: dict[Key, Series] = {}
    for run in runs:
        gathered: dict[Key, list[Row]] = defaultdict(list)
        for row in run.rows:
            gathered[row.key].append(row)
        for key, rows in gathered.items():
            before = found.get(key)
            if before and (before.run.session, before.run.side) == (run.session, run.side):
                found[key] = Series([*before.rows, *rows], run)
            else:
                found[key] = Series(rows, run)
    return found


def compare(
    base: Sequence[Run],
    head: Sequence[Run],
    gate: Gate | None = None,
    *,
    impls: Sequence[str] = (),
    ops: Sequence[str] = (),
    force: bool = False,
) -> Report:
    """Compares every row of base with head's.

    Args:
        base, head: runs, the oldest first.
        gate: what counts as a change.
        impls: implementations that are judged; none means the backends, since other libraries and
            `torch.compile` are not this code's to answer for.
        ops: names of ops; none means all.
        force: compare unlike machines and versions all the same.

    Raises:
        Unlike: the results come from different machines, versions or compilers.
    """
    gate = gate or Gate()
    mine, theirs = series(base), series(head)
    # `budget` names its kinds as implementations: what bears figures is always judged.
    kept = [
        key for key, one in mine.items()
        if (not ops or key[0] in ops) and (one.rows[0].figures or key[4] in (impls or BACKENDS))
    ]  # fmt: skip
    notes = _unlike([(mine[key], theirs[key]) for key in kept if key in theirs], force)
    interrupted = any(not run.complete for run in head)
    rows = [_one(mine[key], theirs.get(key), gate, interrupted) for key in kept]
    rows = [row for row in rows if row is not None]
    notes += [
        f"Not compared, since base is not right: {was.complaint}" for was in (mine[key].row for key in kept)
        if was.status in ("incorrect", "error") and not was.figures
    ]  # fmt: skip
    _judge([row for row in rows if row.p is not None], gate)
    rows.sort(key=lambda row: VERDICTS.index(row.verdict))
    new = [key for key in theirs if key not in mine and key[4] in (impls or BACKENDS)]
    if new:
        notes.append(f"{len(new)} rows are new in head and have nothing to be compared with.")
    return Report(rows, notes + _advice(rows, gate), gate)


def _unlike(pairs: Iterable[tuple[Series, Series]], force: bool) -> list[str]:
    """What differs between the machines of pairs of rows, as notes; an error unless forced."""
    found: dict[str, None] = {}
    for base, head in pairs:
        a, b = base.run.fingerprint, head.run.fingerprint
        if base.rows[0].figures:
            kind = base.rows[0].impl
            a, b = ({kind: one.get("tools", {}).get(kind)} for one in (a, b))
            found |= {f"{kind}: {a[kind]} and {b[kind]}": None} if a != b else {}
            continue
        for name in _ALIKE:
            if a.get(name) != b.get(name):
                found[f"{name}: {a.get(name)} and {b.get(name)}"] = None
    if found and not force:
        raise Unlike(
            f"base and head were not measured under like conditions ({'; '.join(found)}): "
            "measure both on one machine, or compare with --force"
        )
    return [f"Careful: compared by force, although conditions differ: {'; '.join(found)}."] if found else []


def _one(base: Series, head: Series | None, gate: Gate, interrupted: bool) -> Comparison | None:
    """A row without its verdict where that depends on the other rows; None where base has nothing to lose."""
    was = base.row
    row = Comparison(was.op, was.impl, was.case, was.dtype, was.direction, was.device)
    if was.figures:
        return _figures(row, was, head)
    if was.status != "ok":
        return None
    row.base_us = was.median_us
    if head is None:
        why = "head was interrupted before it" if interrupted else "head has no such row"
        return replace(row, verdict="missing", status="absent", reason=why)
    now = head.row
    if now.status != "ok":
        return replace(row, verdict="missing", status=now.status, reason=f"{now.status}: {now.reason}")
    if now.bytes is not None and was.bytes is not None and (was.bytes, was.flops) != (now.bytes, now.flops):
        why = f"the case is another: {was.bytes:.0f} bytes became {now.bytes:.0f}"
        return replace(row, verdict="missing", reason=why)
    row.head_us = now.median_us
    if not was.samples_us or not now.samples_us:
        return replace(row, reason="without raw samples there is no interval")
    _evidence(row, base, head, gate)
    return row


def _evidence(row: Comparison, base: Series, head: Series, gate: Gate) -> None:
    """Fills in change, interval, rank test and noise floor."""
    was, now = base.row.samples_us, head.row.samples_us
    if base.run.session == head.run.session and base.run.side != head.run.side:
        changes = [stats.midmean(stats.logarithms(stats.paired(h, b))) for b, h in zip(was, now) if b and h]
        row.processes = (len(changes),) * 2
        middle, interval = stats.midmean(changes), stats.midmean_ci(changes)
        row.p, row.floor = stats.signed_rank(changes), gate.least
    else:
        sides = [stats.logarithms([stats.quiet(s) for s in side if s]) for side in (was, now)]
        row.processes = (len(sides[0]), len(sides[1]))
        middle = stats.midmean(sides[1]) - stats.midmean(sides[0])
        interval = stats.midmean_ci(sides[1], sides[0])
        row.p, row.floor = stats.rank_sum(*sides), max(gate.least, _repeats(base, gate))
    row.ratio, row.ratio_ci = math.exp(middle), (math.exp(interval[0]), math.exp(interval[1]))


def _repeats(base: Series, gate: Gate) -> float:
    """How far one more run of base's code may lie from these, relative; `gate.unknown` without repeats."""
    runs = [
        stats.midmean(stats.logarithms([stats.quiet(samples) for samples in row.samples_us]))
        for row in base.rows
        if row.samples_us
    ]
    return math.expm1(min(stats.repeat_limit(runs), 700.0)) if len(runs) > 1 else gate.unknown


def _judge(rows: list[Comparison], gate: Gate) -> None:
    """Gives the rows with evidence their verdict; the rank tests are corrected for all of them."""
    for row, p in zip(rows, stats.holm([row.p for row in rows])):
        row.p = p
        low, high = row.ratio_ci
        change = max(row.ratio, 1 / row.ratio) - 1
        statistical = p <= gate.level and not low <= 1 <= high
        absolute = abs(row.ratio - 1) * row.base_us > gate.absolute_us
        within = 1 / (1 + row.floor) <= low and high <= 1 + row.floor
        if statistical and row.changed and absolute:
            row.verdict = "slower" if row.ratio > 1 else "faster"
        elif row.floor > gate.least and row.floor >= gate.blind:
            row.reason = f"noise alone makes up to {share(row.floor)}"
        elif within and min(row.processes) > 1:
            row.verdict = "same"
        elif row.changed and not absolute and statistical:
            row.verdict, row.reason = "same", f"a change below {gate.absolute_us} us"
        elif row.changed:
            row.reason = f"a change of {change:.0%}, but p = {p:.2g} with {min(row.processes)} processes"
        else:
            row.reason = f"the interval goes beyond the floor of {share(row.floor)}"


def _figures(row: Comparison, was: Row, head: Series | None) -> Comparison:
    """The verdict on figures of a compiler or counter: exact, so that any change beyond rounding counts."""
    if head is None or not head.row.figures:
        why = "head has no such kernel" if head is None else f"{head.row.status}: {head.row.reason}"
        # A kernel that is not declared any more is gone; only one that does not compile is broken.
        status = "error" if head and head.row.status == "error" else "absent"
        return replace(row, verdict="missing", status=status, reason=why.rstrip(": "))
    now = head.row
    gone = sorted(set(was.figures) - set(now.figures))
    if gone:
        return replace(row, verdict="missing", reason=f"head has no figure for {', '.join(gone)}")
    known = {name: now.figures[name] for name in was.figures}
    row.figures = {name: (was.figures[name], known[name]) for name in was.figures}
    worse, better = excess(known, was.figures), excess(was.figures, known)
    row.verdict = "slower" if worse else "faster" if better else "same"
    changed = [f"{name} {a} -> {b}" for name, (a, b) in row.figures.items() if a != b]
    row.reason = ", ".join(changed)
    return row


def _advice(rows: Sequence[Comparison], gate: Gate) -> list[str]:
    """What would make a comparison say more."""
    timed = [row for row in rows if row.ratio is not None]
    said = []
    if any(row.floor == gate.unknown for row in timed):
        said.append(
            f"No repeated runs show base's noise, which is taken as {gate.unknown:.0%}: "
            "rlhf-kernels bench ... --save-baseline NAME --runs 5 measures it; "
            "rlhf-kernels regress needs none."
        )
    if any(row.verdict == "inconclusive" and min(row.processes) < 6 for row in timed):
        said.append("Few processes tell little: bench --processes 8, regress --pairs 8.")
    return said


def wrong(rows: Iterable[Comparison]) -> bool:
    """Whether a row became incorrect or broke, which is worse than slow."""
    return any(row.verdict == "missing" and row.status in ("incorrect", "error") for row in rows)
