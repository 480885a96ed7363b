"""The report's figures: latency against size, speed-up bars, the roofline."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_kernels.engine import stats
from rlhf_kernels.engine.history import EXACT, Series
from rlhf_kernels.engine.implementations import COMPILED, EAGER
from rlhf_kernels.engine.report import svg
from rlhf_kernels.engine.results import Entry, commands
from rlhf_kernels.engine.roofs import Roofs
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.show import short
from rlhf_kernels.engine.table import duration, size
from rlhf_kernels.runtime.dispatch import BACKENDS

OURS = tuple(name for name in BACKENDS if name not in ("torch", "reference"))
_FIXED = {"native": 0, EAGER: 1, COMPILED: 2, "triton": 3, "gluon": 4}
# Bars of a figure; a taller one cannot be seen at once.
_MOST_BARS = 60
_SAME_SIZE = 1.3


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption and the commands that measured what it shows."""

    title: str
    svg: str
    caption: str
    commands: list[str]


def order(names: Iterable[str]) -> list[str]:
    """Our backends, then eager PyTorch and its compiler, then the rest by name."""
    first = [*OURS, EAGER, COMPILED]
    names = set(names)
    return [name for name in first if name in names] + sorted(names - set(first))


def styles(entries: Iterable[Entry]) -> dict[str, int]:
    """A number for each implementation of an op: it stands for colour, marker and hatch.

    Our backends, eager PyTorch and torch.compile have the same in every figure.
    """
    names = order(e.row.impl for e in entries)
    found = {name: _FIXED[name] for name in names if name in _FIXED}
    free = [n for n in range(3, len(svg.SERIES)) if n not in found.values()]
    others = [name for name in names if name not in found]
    return found | {name: free[n % len(free)] for n, name in enumerate(others)}


def _style_of(op: str, entries: Iterable[Entry]) -> dict[str, int]:
    return styles(entry for entry in entries if entry.row.op == op)


def work(row: Row) -> tuple[float, float]:
    """Least bytes and operations of a timed row's op."""
    return row.gbps * row.median_us * 1e3, row.tflops * row.median_us * 1e6


def quartiles(row: Row) -> tuple[float, float]:
    """First and third quartile of all samples in us."""
    samples = sorted(s for process in row.samples_us for s in process)
    if len(samples) < 4:
        return row.ci_us or (row.median_us, row.median_us)
    return samples[len(samples) // 4], samples[(3 * len(samples)) // 4]


def latency(entries: Sequence[Entry]) -> list[Figure]:
    """Time against bytes moved, a figure an op, direction and dtype that has two sizes or more."""
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.row.op, short(entry.row.direction), entry.row.dtype].append(entry)
    return [
        _latency(" ".join(names), found, _style_of(names[0], entries))
        for names, found in groups.items()
        if len(set(sizes(e.row for e in found).values())) > 1
    ]


def sizes(rows: Iterable[Row]) -> dict[float, float]:
    """Bytes -> the size that they count as: cases that differ by a mask alone are of one size."""
    found: dict[float, float] = {}
    first = 0.0
    for moved in sorted({work(row)[0] for row in rows}):
        first = first if first and moved < _SAME_SIZE * first else moved
        found[moved] = first
    return found


def _latency(title: str, entries: Sequence[Entry], style: Mapping[str, int]) -> Figure:
    size_of = sizes(e.row for e in entries)
    with svg.figure() as (drawn, axes):
        for name in order(e.row.impl for e in entries):
            rows = [e.row for e in entries if e.row.impl == name]
            by_size: dict[float, list[Row]] = defaultdict(list)
            for row in sorted(rows, key=lambda row: work(row)[0]):
                by_size[size_of[work(row)[0]]].append(row)
            middle = [stats.median([r.median_us for r in some]) for some in by_size.values()]
            low = [min(quartiles(r)[0] for r in some) for some in by_size.values()]
            high = [max(quartiles(r)[1] for r in some) for some in by_size.values()]
            color, marker = svg.SERIES[style[name]], svg.MARKERS[style[name]]
            axes.plot([], [], f"-{marker}", color=color, label=name)
            axes.plot(list(by_size), middle, color=color)
            axes.fill_between(list(by_size), low, high, color=color, alpha=0.18, linewidth=0)
            axes.plot([work(r)[0] for r in rows], [r.median_us for r in rows], marker, color=color)
        least: dict[float, float] = {}
        for at, roof in sorted((size_of[work(e.row)[0]], e.row.roof_us) for e in entries if e.row.roof_us):
            least.setdefault(at, roof)
        axes.plot(list(least), list(least.values()), "--", color=svg.MUTED, linewidth=1, label="roof")
        _log_axes(axes, size, lambda value: duration(value))
        axes.set_xlabel("bytes that have to be moved")
        _legend(drawn)
        drawing = svg.inline(drawn, f"Time against size: {title}")
    caption = (
        "A mark a case, a line through the median at each size, the band from the first to the third "
        "quartile of all samples. Dashed: a copy of as many bytes, or a matrix product of as many operations."
    )
    return Figure(title, drawing, caption, commands(entries))


def _log_axes(axes: Any, show_x: Callable[[float], str], show_y: Callable[[float], str]) -> None:
    """Makes both axes logarithmic, with labels of these forms."""
    axes.set(xscale="log", yscale="log")
    _log_axis(axes.xaxis, show_x)
    _log_axis(axes.yaxis, show_y)


def _log_axis(axis: Any, show: Callable[[float], str]) -> None:
    """Labels at 1, 2 and 5 where there is little more than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 5, 7) if high < 4 * low else (1, 2, 5) if high < 30 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(show(value))))
    axis.set_minor_formatter(NullFormatter())


def _plain(text: str) -> str:
    """'10 us' for '10.0 us'."""
    return re.sub(r"\.0+(?= |$)", "", text)


def _legend(drawn: Any) -> None:
    """Below the axes, in as many columns as the longest name leaves room for."""
    longest = max(len(text) for axes in drawn.axes for text in axes.get_legend_handles_labels()[1])
    drawn.legend(loc="outside lower center", ncols=3 if longest <= 14 else 2)


def speedups(entries: Sequence[Entry]) -> list[Figure]:
    """Speed-up bars with their intervals, a figure an op, dtype and baseline."""
    groups: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        row = entry.row
        if row.speedup and row.impl != row.baseline:
            groups[row.op, row.dtype, row.baseline].append(entry)
    return [
        _speedups(*names, found[:_MOST_BARS], _style_of(names[0], entries)) for names, found in groups.items()
    ]


def _speedups(
    op: str, dtype: str, baseline: str, entries: Sequence[Entry], style: Mapping[str, int]
) -> Figure:
    places: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for entry in entries:
        places[entry.row.case, short(entry.row.direction)].append(entry.row)
    names = order(e.row.impl for e in entries)
    title = f"{op} {dtype} over {_called(baseline)}"
    with svg.figure(height=0.9 + 0.16 * len(entries) + 0.14 * len(places)) as (drawn, axes):
        at, ticks = 0.0, []
        seen: set[str] = set()
        for place, rows in places.items():
            rows = sorted(rows, key=lambda row: names.index(row.impl))
            ticks.append((at + (len(rows) - 1) / 2, " ".join(place)))
            for row in rows:
                _bar(axes, at, row, style[row.impl], "" if row.impl in seen else row.impl)
                seen.add(row.impl)
                at += 1
            at += 0.9
        axes.set_xscale("log")
        axes.axvline(1, color=svg.INK, linewidth=1)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.8), max(high, 1.25) * (max(high, 1.25) / min(low, 0.8)) ** 0.12)
        _log_axis(axes.xaxis, lambda value: f"{value:g}x")
        axes.set_yticks([where for where, _ in ticks], [text for _, text in ticks])
        axes.grid(False, axis="y")
        axes.set_ylim(max(at - 0.9, 2), -0.9)
        _legend(drawn)
        drawing = svg.inline(drawn, f"Speed-up: {title}")
    caption = f"Time of {_called(baseline)} over the time of each, by rounds; whiskers: 95 % interval."
    return Figure(title, drawing, caption, commands(entries))


def _bar(axes: Any, at: float, row: Row, number: int, label: str) -> None:
    low, high = row.speedup_ci or (row.speedup, row.speedup)
    spread = [[max(row.speedup - low, 0)], [max(high - row.speedup, 0)]]
    axes.barh(
        at, row.speedup - 1, left=1, height=0.86, color=svg.SERIES[number], hatch=svg.HATCHES[number],
        label=label or None, xerr=spread, error_kw={"ecolor": svg.INK, "elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    axes.annotate(
        f" {row.speedup:.3g}x", (max(high, 1), at), va="center", fontsize=8, xytext=(2, 0),
        textcoords="offset points",
    )  # fmt: skip


def _called(name: str) -> str:
    return "eager PyTorch" if name == EAGER else name


def best(entries: Iterable[Entry]) -> dict[tuple[str, ...], Entry]:
    """The fastest of our backends at each op, case, dtype and direction."""
    found: dict[tuple[str, ...], Entry] = {}
    for entry in entries:
        key = entry.row.key[:4]
        if entry.row.impl in OURS and (key not in found or entry.row.median_us < found[key].row.median_us):
            found[key] = entry
    return found


def roofline(entries: Sequence[Entry], roofs: Roofs | None) -> list[Figure]:
    """Operations a second against intensity, a figure a dtype.

    Args:
        entries: timed rows of one machine.
        roofs: measured on that machine, where they are still known; without them the slopes are those of the
            copies that were timed beside the rows, and there is no level roof.
    """
    by_dtype: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.row.tflops and entry.row.roof_us:
            by_dtype[entry.row.dtype].append(entry)
    found = []
    for dtype, group in by_dtype.items():
        if best(group):
            found.append(_roofline(dtype, group, roofs))
    return found


def _slopes(entries: Sequence[Entry], roofs: Roofs | None) -> tuple[float, float]:
    """Bytes a second of the slowest and the fastest copy."""
    rates = list(roofs.copy.values()) if roofs and roofs.copy else []
    rates = rates or [work(e.row)[0] / e.row.roof_us * 1e6 for e in entries]
    return min(rates), max(rates)


def _roofline(dtype: str, entries: Sequence[Entry], roofs: Roofs | None) -> Figure:
    slow, fast = _slopes(entries, roofs)
    level = roofs.matmul.get(dtype) if roofs else None
    ours = best(entries)
    eager = {e.row.key[:4]: e.row for e in entries if e.row.impl == EAGER}
    intensity = [work(e.row)[1] / work(e.row)[0] for e in ours.values()]
    left, right = min(intensity) / 2, max(*intensity, (level or 0) / slow) * 2
    with svg.figure(height=3.9) as (drawn, axes):
        xs = [left * (right / left) ** (n / 80) for n in range(81)]
        tops = [[min(x * rate, level or math.inf) / 1e9 for x in xs] for rate in (slow, fast)]
        axes.fill_between(xs, *tops, color=svg.MUTED, alpha=0.2, linewidth=0)
        for ys, label in zip(tops, (None, "roofs")):
            axes.plot(xs, ys, color=svg.MUTED, linewidth=1, label=label)
        for number, op in enumerate(sorted({key[0] for key in ours})):
            color, marker = svg.SERIES[number % 8], svg.MARKERS[(number + number // 8) % 8]
            for key in (key for key in ours if key[0] == op):
                moved, flops = work(ours[key].row)
                y = flops / ours[key].row.median_us / 1e3
                if key in eager:
                    before = work(eager[key])[1] / eager[key].median_us / 1e3
                    axes.plot([flops / moved] * 2, [before, y], color=color, linewidth=0.7, alpha=0.6)
                    axes.plot(flops / moved, before, marker, color=color, fillstyle="none", markersize=4)
                axes.plot(flops / moved, y, marker, color=color, label=op)
                op = "_"  # named once
        _log_axes(axes, "{:g}".format, "{:g}".format)
        axes.set_xlabel("operations a byte")
        axes.set_ylabel("GFLOP/s")
        _legend(drawn)
        drawing = svg.inline(drawn, f"Roofline, {dtype}")
    source = "measured on this machine" if roofs and roofs.copy else "those timed beside the rows"
    product = f"level: a matrix product, {level / 1e9:.3g} GFLOP/s" if level else "no matrix product is known"
    caption = (
        "Filled: our fastest backend at each case; hollow: eager PyTorch. Slopes: the slowest and the "
        f"fastest copy ({slow / 1e9:.3g} and {fast / 1e9:.3g} GB/s, {source}); {product}. Where data "
        "stays in a cache, a copy is faster than memory."
    )
    return Figure(f"Roofline, {dtype}", drawing, caption, commands(ours.values()))


def history(found: Sequence[Series], commands: Mapping[int, str]) -> list[Figure]:
    """A figure a series: its runs with their intervals, levels, noise band and steps.

    Args:
        found: series with two points or more.
        commands: of the runs, by number.
    """
    return [_history(one, commands) for one in found]


SHOW = {"time": duration, "speedup": "{:.3g}x".format, "roof": "{:.0%}".format} | dict.fromkeys(
    EXACT, "{:,.0f}".format
)


def _history(one: Series, commands: Mapping[int, str]) -> Figure:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    show, points = SHOW[one.metric], one.points
    with svg.figure(height=2.5) as (drawn, axes):
        at = range(len(points))
        below = [max(p.value - p.low, 0) for p in points]
        above = [max(p.high - p.value, 0) for p in points]
        for first, stop, level in one.levels:
            around = [level * math.exp(sign * 2 * one.noise) for sign in (-1, 1)]
            edges = (first - 0.5, stop - 0.5)
            axes.fill_between(edges, *around, color=svg.SERIES[0], alpha=0.15, linewidth=0)
            axes.plot(edges, [level] * 2, color=svg.SERIES[0], linewidth=1.2)
        axes.errorbar(at, [p.value for p in points], yerr=[below, above], fmt="o", color=svg.SERIES[0],
                      ecolor=svg.MUTED, elinewidth=1, markersize=4)  # fmt: skip
        _cut_off(axes, one)
        for step in one.steps:
            axes.axvline(step.at - 0.5, color=svg.SERIES[1], linestyle="--", linewidth=1.2)
            axes.annotate(
                f" {step.shown('+')}", (step.at - 0.5, 1), xycoords=("data", "axes fraction"), va="top",
                color=svg.SERIES[1],
            )  # fmt: skip
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(show(value))))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _run_label(points, x)))
        axes.set_xlim(-0.6, len(points) - 0.4)
        axes.set_xlabel(f"run ({points[0].started[:10]} to {points[-1].started[:10]})")
        drawing = svg.inline(drawn, f"History of {one.title}: {one.told}")
    band = "" if one.metric in EXACT else f" Band: twice the noise, {2 * one.noise:.1%}, around each level."
    caption = one.told + band
    typed = list(dict.fromkeys(commands[p.number] for p in points if p.number in commands))
    return Figure(one.title, drawing, caption, typed)


def _cut_off(axes: Any, one: Series) -> None:
    """Ends the axis not far from the levels; what lies beyond is a triangle at its end."""
    levels = [level for *_, level in one.levels]
    room = 1.3 * max(levels) - min(levels)
    low = max(axes.get_ylim()[0], min(levels) * math.exp(-5 * one.noise) - 0.1 * room)
    high = min(axes.get_ylim()[1], max(levels) * math.exp(5 * one.noise) + 0.1 * room)
    axes.set_ylim(low, high)
    for at, point in enumerate(one.points):
        if not low <= point.value <= high:
            edge, marker = (high, "^") if point.value > high else (low, "v")
            axes.plot(at, edge, marker, color=svg.SERIES[0], clip_on=False)


def _run_label(points: Sequence[Any], x: float) -> str:
    return f"#{points[round(x)].number}" if 0 <= round(x) < len(points) and x == round(x) else ""
