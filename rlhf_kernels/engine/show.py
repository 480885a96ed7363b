"""How results read: tables of rows, outcomes and findings, with notes that say how they were made."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_kernels.engine.doctor import Finding
from rlhf_kernels.engine.implementations import EAGER
from rlhf_kernels.engine.row import Row, dtype_name
from rlhf_kernels.engine.spec import OpSpec
from rlhf_kernels.engine.table import duration, figure, print_notes, print_table, size
from rlhf_kernels.engine.tune import Outcome, text

SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}


def short(direction: str) -> str:
    """'fwd' for forward; what has no short form is shown as it is."""
    return SHORT.get(direction, direction)


def doctor(findings: Iterable[Finding]) -> None:
    """One table; a topic is named once."""
    rows = []
    for topic, found in itertools.groupby(findings, lambda f: f.topic):
        for number, one in enumerate(found):
            rows.append(["" if number else topic, one.name, one.state, one.detail])
    print_table(("topic", "name", "state", "detail"), rows)


def ops(specs: Sequence[OpSpec]) -> None:
    """The ops, a line each."""
    rows = []
    for spec in specs:
        tiers = Counter(case.tier for case in spec.cases)
        cases = ", ".join(f"{count} {tier}" for tier, count in tiers.items())
        rows.append([spec.name, spec.summary, " ".join(spec.op.declared()), " ".join(spec.directions), cases])
    print_table(("op", "what", "backends", "directions", "cases"), rows)
    print_notes(["rlhf-kernels list <op> shows its cases."])


def cases(spec: OpSpec) -> None:
    """The cases of one op."""
    rows = []
    for case in spec.cases:
        sizes = " ".join(f"{letter}={n}" for letter, n in case.sizes.items())
        options = " ".join(f"{name}={value}" for name, value in case.options.items())
        rows.append([case.name, case.tier, sizes, options, " ".join(map(dtype_name, case.dtypes))])
    print_table(("case", "tier", "sizes", "options", "dtypes"), rows, f"{spec.name}: {spec.summary}")


def check(rows: Sequence[Row], verbose: bool) -> None:
    """A line an op and backend, then what failed; all rows where `verbose`."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.op, row.impl, row.direction].append(row)
    lines = []
    for (op, impl, direction), found in groups.items():
        judged = [row for row in found if row.status != "unavailable"]
        good = sum(row.status == "ok" for row in judged)
        state = "unavailable" if not judged else "ok" if good == len(judged) else "incorrect"
        used = [(row.error / row.allowed, row) for row in judged if row.allowed and row.error is not None]
        share, worst = max(used, key=lambda pair: pair[0], default=(None, None))
        where = f"{worst.case} {worst.dtype}" if worst else ""
        lines.append([
            op, impl, SHORT[direction], state, f"{good}/{len(judged)}", figure(share, "{:.0%}"), where,
        ])  # fmt: skip
    print_table(("op", "backend", "dir", "state", ">right", ">of allowed error", "worst at"), lines)
    shown = rows if verbose else [row for row in rows if row.status in ("incorrect", "error")]
    if shown:
        details = [
            [row.op, row.impl, row.case, row.dtype, SHORT[row.direction], row.status,
             figure(row.error), figure(row.allowed), row.reason]
            for row in shown
        ]  # fmt: skip
        names = ("op", "backend", "case", "dtype", "dir", "state", ">error", ">allowed", "reason")
        print_table(names, details, "All" if verbose else "What failed")
    print_notes(refusals(rows))
    if not any(row.status != "unavailable" for row in rows):
        print_notes(["Nothing was checked."])


def bench(rows: Sequence[Row], specs: Mapping[str, OpSpec]) -> None:
    """A table an op: implementations of one case and direction below one another, and what they lack."""
    names = (
        "implementation", ">time", ">+-", f">vs {_baseline(rows)}", ">GB/s", ">of roof", ">memory", ">error",
    )  # fmt: skip
    for op, found in itertools.groupby(rows, lambda row: row.op):
        lines: list[list[str]] = []
        timed = (row for row in found if row.status != "unavailable")
        for where, group in itertools.groupby(timed, lambda row: (row.case, row.dtype, row.direction)):
            lines.append([" ".join((*where[:2], SHORT[where[2]]))])
            lines += [_timing(row) for row in group]
        print_table(names, lines, f"{op}: {specs[op].summary}")
    print_notes([row.complaint for row in rows if row.status in ("incorrect", "error")])
    print_notes(refusals(rows))


def _baseline(rows: Sequence[Row]) -> str:
    return next((row.baseline for row in rows if row.baseline), EAGER)


def _timing(row: Row) -> list[str]:
    name = f"  {row.impl} {row.version or ''}".rstrip()
    if row.median_us is None:
        return [name, row.status, "", "", "", "", "", figure(row.error, "{:.1e}")]
    low, high = row.ci_us
    spread = (high - low) / 2
    return [
        name, duration(row.median_us, spread), f"{spread / row.median_us:.1%}",
        figure(row.speedup, "{:.2f}x"), figure(row.gbps), figure(row.roof_fraction, "{:.0%}"),
        size(row.peak_bytes or 0), figure(row.error, "{:.1e}"),
    ]  # fmt: skip


def how_timed(rows: Sequence[Row]) -> list[str]:
    """What the columns of `bench` mean and how the figures were taken."""
    timed = [row for row in rows if row.median_us is not None]
    if not timed:
        return []
    processes = max(len(row.samples_us) for row in timed)
    counts = [len(samples) for row in timed for samples in row.samples_us]
    taken = f"{processes} processes, each " if processes > 1 else ""
    threads = f"{timed[0].threads} thread{'s' * (timed[0].threads != 1)}"
    return [
        f"Time: median of {taken}{min(counts)} to {max(counts)} samples in interleaved, shuffled rounds, "
        f"{threads} on {timed[0].device}; +- is half its 95 % interval.",
        f"vs {_baseline(rows)}: its time over this one, by rounds (torch is eager PyTorch). Of roof: "
        "the time of a copy of as many bytes, or of a matrix product of as many operations, over this one. "
        "Memory: above the inputs. Error: the largest against float64.",
    ]


def refusals(rows: Sequence[Row]) -> list[str]:
    """What is unavailable, a line an implementation, with the reasons and the ops that they hold for."""
    reasons: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.status == "unavailable":
            reasons[row.impl][row.reason.removeprefix(f"{row.impl} ")][row.op] = None
    return [
        f"{impl} is unavailable: "
        + "; ".join(f"{reason} ({', '.join(ops)})" for reason, ops in found.items())
        for impl, found in reasons.items()
    ]


def tune(outcomes: Sequence[Outcome]) -> None:
    """What was found best; candidates that failed their check are named."""
    rows = []
    for one in outcomes:
        best, default = (one.timings_us.get(text(v)) for v in (one.values, one.default))
        rows.append([
            one.op, one.case, one.dtype, one.backend, one.function, text(one.values),
            duration(best) if best else "", duration(default) if default else "",
            f"{one.gain:.2f}x" if one.values != one.default else "default", str(len(one.timings_us)),
        ])  # fmt: skip
    names = ("op", "case", "dtype", "backend", "function", "best", ">time", ">default", ">gain", ">tried")
    print_table(names, rows)
    print_notes([
        f"{one.op} {one.case} {one.dtype}: {values} was refused: {reason}"
        for one in outcomes for values, reason in one.refused.items()
    ])  # fmt: skip


def budget(rows: Sequence[Mapping[str, Any]], verbose: bool) -> None:
    """A line an op, kind and target; then what is over its budget, or all kernels where `verbose`."""
    counts = Counter((row["op"], row["impl"], row["device"], row["status"]) for row in rows)
    lines = [[op, kind, target, status, str(n)] for (op, kind, target, status), n in counts.items()]
    print_table(("op", "kind", "target", "state", ">kernels"), lines)
    shown = [row for row in rows if verbose or row["status"] in ("incorrect", "error")]
    if shown:
        known = ("op", "impl", "case", "device", "status", "reason")
        details = [
            [*(row[name] for name in known), " ".join(f"{k}={v}" for k, v in row.items() if type(v) is int)]
            for row in shown
        ]
        names = ("op", "kind", "kernel", "target", "state", "reason", "figures")
        print_table(names, details, "All" if verbose else "Over budget")
    reasons = {(row["impl"], row["reason"]) for row in rows if row["status"] == "unavailable"}
    print_notes([f"{kind} is unavailable: {reason}" for kind, reason in sorted(reasons)])


def targets(rows: Sequence[Mapping[str, Any]], _: bool = False) -> None:
    """The stacks that `patch` knows."""
    lines = [
        [row["target"], ", ".join(row["checked"]), row["installed"] or "absent", ", ".join(row["functions"])]
        for row in rows
    ]
    print_table(("target", "checked", "installed", "functions"), lines)
    print_notes(["rlhf-kernels patch TARGET --check compares and times them on this machine."])


def patch(rows: Sequence[Mapping[str, Any]], measured: bool) -> None:
    """What is replaced in a stack, and what is left and why; differences, times and memory where measured."""
    lines, heads = [], ["function", "by", "state"]
    for row in rows:
        line = [row["name"], row["op"], row["status"]]
        if measured:
            times = [duration(row[key]) if row[key] else "" for key in ("before_us", "after_us")]
            held = [size(row[key]) if row[key] is not None else "" for key in ("before_bytes", "after_bytes")]
            line += [figure(row["error"], "{:.1e}"), *times, figure(row["speedup"], "{:.3g}x"), *held]
        lines.append([*line, row["reason"] or ""])
    if measured:
        heads += [">difference", ">before", ">after", ">speed-up", ">memory before", ">after"]
    print_table((*heads, "why"), lines, f"{rows[0]['target']} {rows[0]['version']} on {rows[0]['device']}")
