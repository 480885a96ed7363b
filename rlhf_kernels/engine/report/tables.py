"""The report's tables: cells with what they sort by."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_kernels.engine.budget.ledger import DIRECTORY, Ledger
from rlhf_kernels.engine.history import Series
from rlhf_kernels.engine.implementations import COMPILED, EAGER
from rlhf_kernels.engine.report import plots
from rlhf_kernels.engine.results import Entry, Machine, commands
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.show import short
from rlhf_kernels.engine.table import duration, figure, size


@dataclass(frozen=True)
class Cell:
    """One cell of a table: `key` is what it sorts by, `kind` a CSS class."""

    text: str
    key: Any = ""
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its caption and the commands that reproduce it; a name with '>' is a number."""

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    commands: Sequence[str] = ()


def summary(timed: Sequence[Entry]) -> Table:
    """A line an op: its fastest backend against eager PyTorch, torch.compile and the fastest other stack."""
    others: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for entry in timed:
        if entry.row.impl not in plots.OURS:
            others[(*entry.row.key[:4], entry.number)].append(entry.row)
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[str, list[float]] = defaultdict(list)
    backends: dict[str, Counter[str]] = defaultdict(Counter)
    for key, entry in plots.best(timed).items():
        row = entry.row
        backends[row.op][row.impl] += 1
        shares[row.op] += [row.roof_fraction] if row.roof_fraction else []
        rows = others[(*key, entry.number)]  # of the same run: interleaved
        peers = [other for other in rows if other.impl not in (EAGER, COMPILED)]
        fastest = min(peers, key=lambda other: other.median_us, default=None)
        for name in (EAGER, COMPILED):
            ratios[row.op][name] += [o.median_us / row.median_us for o in rows if o.impl == name]
        if fastest:
            ratios[row.op]["peers"].append(fastest.median_us / row.median_us)
    lines = [
        [
            Cell(op, op), Cell(", ".join(used), kind="minor"), _count(sum(used.values())),
            *(_ratio(ratios[op][name]) for name in (EAGER, COMPILED, "peers")),
            _percent(statistics.median(shares[op]) if shares[op] else None),
        ]
        for op, used in backends.items()
    ]  # fmt: skip
    names = ("op", "backend", ">cases", ">over eager", ">over torch.compile", ">over best peer", ">of roof")
    caption = (
        "Our fastest backend: geometric mean over cases and directions of the same run's medians, least and "
        "most in brackets; the share of the roof is the median of the cases."
    )
    return Table("Summary", names, lines, caption, commands(plots.best(timed).values()))


def _count(value: int) -> Cell:
    return Cell(str(value), value)


def _ratio(values: Sequence[float]) -> Cell:
    if not values:
        return Cell("", -1)
    middle = statistics.geometric_mean(values)
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return Cell(f"{middle:.3g}x{spread}", middle, "good" if middle > 1 else "bad")


def _percent(value: float | None) -> Cell:
    return Cell(figure(value, "{:.0%}"), -1 if value is None else value)


def times(timed: Sequence[Entry]) -> Table:
    """Every time with its interval and what follows from it."""
    lines = []
    for entry in timed:
        row = entry.row
        low, high = row.ci_us
        spread = (high - low) / 2
        within = f"{duration(low, spread)} to {duration(high, spread)}"
        gain = Cell("", -1)
        if row.speedup:
            a, b = row.speedup_ci or (row.speedup, row.speedup)
            own = "baseline" if row.impl == row.baseline else f"{row.speedup:.3g}x"
            over = "" if row.impl == row.baseline else f" ({a:.3g} to {b:.3g}) over {row.baseline}"
            gain = Cell(own + over, row.speedup)
        lines.append([
            Cell(row.op, row.op), Cell(row.case, row.case), Cell(row.dtype, row.dtype),
            Cell(short(row.direction), row.direction),
            Cell(f"{row.impl} {row.version or ''}".strip(), row.impl),
            Cell(duration(row.median_us, spread), row.median_us),
            Cell(within, spread / row.median_us, "minor"), gain,
            Cell(figure(row.gbps), row.gbps or -1, "minor"), _percent(row.roof_fraction),
            Cell(size(row.peak_bytes or 0), row.peak_bytes or 0, "minor"),
            Cell(f"#{entry.number}", entry.number, "minor"),
        ])  # fmt: skip
    names = (
        "op", "case", "dtype", "dir", "implementation", ">time", ">95 % interval", ">speed-up", ">GB/s",
        ">of roof", ">memory", ">run",
    )  # fmt: skip
    caption = (
        "The newest measurement of each; medians of interleaved, shuffled rounds. Only what passed its check "
        "has a time. A click on a heading sorts."
    )
    return Table("Times", names, lines, caption, commands(timed))


def errors(entries: Sequence[Entry]) -> Table:
    """The worst error of each op, implementation and dtype, as a share of what is allowed."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    judged = [entry for entry in entries if entry.row.error is not None]
    for entry in judged:
        row = entry.row
        groups[row.op, row.impl, row.dtype].append(row)
    lines = []
    for (op, impl, dtype), rows in sorted(groups.items()):
        worst = max(rows, key=_used)
        bad = sum(row.status == "incorrect" for row in rows)
        lines.append([
            Cell(op, op), Cell(impl, impl), Cell(dtype, dtype),
            Cell(f"{len(rows) - bad} of {len(rows)}", bad, "bad" if bad else ""),
            Cell(f"{worst.error:.2g}", worst.error), Cell(f"{worst.allowed or 0:.2g}", worst.allowed or 0),
            Cell(f"{_used(worst):.0%}", _used(worst), "bad" if _used(worst) > 1 else ""),
            Cell(f"{worst.case} {short(worst.direction)}", worst.case, "minor"),
        ])  # fmt: skip
    names = ("op", "implementation", "dtype", ">right", ">error", ">allowed", ">share", "worst at")
    caption = (
        "The largest absolute error against the definition in float64, at the case that comes nearest to "
        "what is allowed: twice the error of plain PyTorch at the same dtype, and a floor."
    )
    return Table("Errors", names, lines, caption, commands(judged))


def _used(row: Row) -> float:
    if row.allowed:
        return row.error / row.allowed
    return float("inf") if row.error else 0.0


def failures(entries: Sequence[Entry]) -> Table:
    """What is not ok, with its reason."""
    rank = {"incorrect": 0, "error": 1, "unavailable": 2}
    bad = sorted((e for e in entries if e.row.status != "ok"), key=lambda e: rank[e.row.status])
    lines = [
        [
            Cell(e.row.status, rank[e.row.status], "bad" if e.row.status != "unavailable" else "minor-text"),
            Cell(e.row.op, e.row.op), Cell(e.row.impl, e.row.impl), Cell(e.row.case, e.row.case),
            Cell(e.row.dtype, e.row.dtype), Cell(short(e.row.direction), e.row.direction),
            Cell(e.row.reason, e.row.reason, "wide"),
        ]
        for e in bad
    ]  # fmt: skip
    names = ("state", "op", "implementation", "case", "dtype", "dir", "reason")
    return Table("Not timed, and why", names, lines, "", commands(bad))


def history(found: Sequence[Series]) -> Table:
    """A line a series: where it stands and how it came there."""
    lines = []
    for one in found:
        level, (*place, direction, impl, device) = one.levels[-1][2], one.key
        lines.append([
            *(Cell(name, name) for name in (*place, short(direction) or device, impl, one.metric)),
            _count(len(one.points)), Cell(plots.SHOW[one.metric](level), level),
            Cell(f"{one.noise:.1%}", one.noise),
            Cell(one.told, -len(one.steps), "wide" + " bad" * _slower(one)),
        ])  # fmt: skip
    names = (
        "op",
        "case",
        "dtype",
        "dir",
        "implementation",
        "metric",
        ">runs",
        ">level now",
        ">noise",
        "steps",
    )
    return Table("History", names, lines, "Stored runs of this machine; the noise is that of one run.")


def _slower(one: Series) -> bool:
    return bool(one.steps) and one.steps[-1].verdict == "slower"


def fingerprint(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value))
        for name, value in found.items()
        if value is not None
    ]


def runs(machine: Machine) -> Table:
    lines = []
    for number, run in machine.runs:
        found = run.fingerprint
        dirty = " +" if found.get("dirty") else ""
        lines.append([
            Cell(f"#{number}", number), Cell(run.started.replace("T", " ")[:16], run.started),
            Cell(f"{(found.get('commit') or '')[:8]}{dirty}", found.get("commit") or ""),
            Cell(str(found.get("torch") or ""), found.get("torch") or ""),
            Cell(str(len(run.rows)) + ("" if run.complete else " (ended early)"), len(run.rows)),
            Cell(run.command, run.command, "command"),
        ])  # fmt: skip
    names = (">run", "started (UTC)", "commit", "torch", ">rows", "command")
    return Table("Runs", names, lines, "A + behind the commit: with changes that were not committed.")


def committed(ops: Iterable[str], directory: Path = DIRECTORY) -> list[dict[str, Any]]:
    """The committed budgets of these ops in the form of `budget --json`, with nothing measured."""
    ops, rows = set(ops), []
    for path in sorted(directory.glob("*.json")):
        ledger = Ledger.load(path.stem, directory)
        for key, figures in sorted(ledger.budgets.items()):
            op, _, rest = key.partition("/")
            name, _, target = rest.rpartition("/")
            if op in ops or path.stem in ops:
                rows.append({"op": op, "case": name, "device": target, "status": "budget", "budget": figures})
    return rows


_FIGURES = ("registers", "spills", "shared", "narrow_loads", "tensor_core", "instructions")


def budgets(measured: Sequence[Mapping[str, Any]], ops: Iterable[str]) -> list[Table]:
    """Budgets by op and target, then kernel by kernel."""
    rows = [row for row in measured or committed(ops) if row.get("budget") or row["status"] != "budget"]
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["op"], row["device"]].append(row)
    lines = [
        [
            Cell(op, op), Cell(target, target), Cell(str(len(found)), len(found)),
            *(_span(name, found) for name in _FIGURES),
            _state(Counter(row["status"] for row in found)),
        ]
        for (op, target), found in sorted(groups.items())
    ]  # fmt: skip
    names = ("op", "target", ">kernels", *(f">{name.replace('_', ' ')}" for name in _FIGURES), "state")
    what = (
        "measured, and held to the committed budgets"
        if measured
        else "as committed; nothing was compiled here"
    )
    caption = (
        f"What compilers and counters say of each kernel, least to most over its configurations ({what}). "
        "tensor core: matrix instructions; narrow loads: below 16 bytes; instructions: of the CPU kernels."
    )
    command = ["rlhf-kernels budget --json > budget.json"]
    each = [
        [
            Cell(row["op"], row["op"]), Cell(row["case"], row["case"]), Cell(row["device"], row["device"]),
            *(_held(name, row) for name in _FIGURES), _state({row["status"]: 1}, row.get("reason", "")),
        ]
        for row in rows
    ]  # fmt: skip
    detail = ("op", "kernel", "target", *names[3:])
    return [Table("Budgets", names, lines, caption, command), Table("Every kernel", detail, each)] * bool(
        rows
    )


def _value(name: str, row: Mapping[str, Any]) -> int | None:
    return row.get(name, (row.get("budget") or {}).get(name))


def _span(name: str, rows: Sequence[Mapping[str, Any]]) -> Cell:
    values = [value for row in rows if (value := _value(name, row)) is not None]
    if not values:
        return Cell("", -1)
    low, high = min(values), max(values)
    bad = "bad" if name == "spills" and high else ""
    return Cell(f"{low:,}" if low == high else f"{low:,} to {high:,}", high, bad)


def _held(name: str, row: Mapping[str, Any]) -> Cell:
    value, allowed = _value(name, row), (row.get("budget") or {}).get(name)
    if value is None:
        return Cell("", -1)
    over = allowed is not None and value > allowed
    return Cell(f"{value:,}" + (f" (budget {allowed:,})" if over else ""), value, "bad" if over else "")


def _state(counts: Mapping[str, int], reason: str = "") -> Cell:
    """'ok', or what is not, with numbers where there are several."""
    bad = {"incorrect", "error"} & set(counts)
    several = sum(counts.values()) > 1 and len(counts) > 1
    text = ", ".join(f"{n} {name}" if several else name for name, n in counts.items())
    return Cell(f"{text}: {reason}" if reason else text, text, "bad" if bad else "")
