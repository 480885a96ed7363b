"""How a comparison reads: a table for people, Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_kernels.engine.compare import Comparison, Report
from rlhf_kernels.engine.table import duration, markdown, print_notes, print_table, share

_NAMES = ("verdict", "op", "implementation", "case", ">base", ">head", ">change", ">95 %", ">floor", "why")
# A word beside each sign, for those who see no colours.
_SIGNS = {"missing": "❌", "slower": "🔺", "inconclusive": "❔", "faster": "🟢", "same": "✅"}
_SHORT = {"forward": "fwd", "backward": "bwd", "forward+backward": "fwd+bwd"}


def summary(report: Report) -> str:
    """'1 slower, 12 same; geometric mean of the times 1.004'."""
    counts = ", ".join(f"{n} {verdict}" for verdict, n in report.counts.items() if n) or "nothing to compare"
    mean = report.geometric_mean
    return counts + (f"; geometric mean of head's times over base's {mean:.3f}" if mean else "")


def compare(report: Report, title: str) -> None:
    """Every row, the worst first, and what must be known beside them."""
    if report.rows:
        print_table(_NAMES, [_cells(row) for row in report.rows], title)
    print_notes([f"{summary(report)}.", *report.notes, how(report)])


def pull_request(report: Report, title: str, again: str) -> str:
    """Markdown for a pull request: a line that says it all, what changed, and the rest folded away."""
    counts = ", ".join(f"{_SIGNS[v]} {n} {v}" for v, n in report.counts.items() if n) or "nothing to compare"
    parts = [f"### {title}", "", counts + "."]
    if mean := report.geometric_mean:
        parts.append(f"Geometric mean of head's times over base's: {mean:.3f}.")
    parts += ["", *(f"> {note}" for note in report.notes)]
    loud = [row for row in report.rows if row.verdict not in ("same", "inconclusive")]
    quiet = [row for row in report.rows if row.verdict in ("same", "inconclusive")]
    if loud:
        parts += ["", _table(loud)]
    if quiet:
        parts += ["", f"<details><summary>{len(quiet)} other rows</summary>", "", _table(quiet), "</details>"]
    return "\n".join([*parts, "", how(report), "", f"Again: `{again}`", ""])


def how(report: Report) -> str:
    """How the verdicts came about."""
    gate = report.gate
    return (
        "A change is called where its 95 % interval and a rank test over processes "
        f"(level {gate.level:.2g} for all rows together) say so, and it exceeds the row's noise floor and "
        f"{gate.absolute_us:g} us."
    )


def _table(rows: Sequence[Comparison]) -> str:
    names = [name.removeprefix(">") for name in _NAMES]
    cells = [[f"{_SIGNS[row.verdict]} {row.verdict}", *_cells(row)[1:]] for row in rows]
    return markdown(names, cells, [name.startswith(">") for name in _NAMES])


def _cells(row: Comparison) -> list[str]:
    case = " ".join(part for part in (row.case, row.dtype, _SHORT.get(row.direction, "")) if part)
    case += f" {row.device}" if row.figures or row.device != "cpu" else ""
    times = [duration(us) if us else "" for us in (row.base_us, row.head_us)]
    change = interval = floor = ""
    if row.ratio is not None:
        low, high = row.ratio_ci
        change, interval = f"{row.ratio - 1:+.1%}", f"{low - 1:+.1%} to {high - 1:+.1%}"
        floor = share(row.floor, 1)
    return [row.verdict, row.op, row.impl, case, *times, change, interval, floor, row.reason]
