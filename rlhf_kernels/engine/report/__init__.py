"""One HTML file that shows stored results: no network, no other file, readable on a phone and in the dark.

    rlhf-kernels report results.jsonl --out report.html

It needs jinja2 and matplotlib: pip install 'rlhf-kernels[report]'.
"""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlhf_kernels.engine import history, roofs
from rlhf_kernels.engine.fingerprint import machine_id
from rlhf_kernels.engine.report import plots, tables
from rlhf_kernels.engine.results import Machine, Results
from rlhf_kernels.engine.select import UsageError

# Of a machine; `history --plots` draws all.
_MOST_HISTORIES = 24
_TEMPLATE = Path(__file__).with_name("page.html")


def missing() -> str | None:
    """Why no report can be made here, or None."""
    absent = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if absent:
        return f"a report needs {' and '.join(absent)}: pip install 'rlhf-kernels[report]'"
    return None


def build(results: Results, command: str, budgets: Sequence[Path] = (), title: str = "") -> str:
    """The page as text.

    Args:
        results: what is shown.
        command: how this report was made.
        budgets: files of `rlhf-kernels budget --json`, besides what `budget --out` put among the results;
            where there is neither, the committed budgets of the ops are shown.
        title: of the page.

    Raises:
        UsageError: jinja2 or matplotlib is not installed; a file of budgets holds none.
    """
    if reason := missing():
        raise UsageError(reason)
    import jinja2

    found = results.machines()
    measured = [row for path in budgets for row in _budget_rows(path)]
    measured += [row for machine in found for row in machine.budgets()]
    machines = [_section(machine) for machine in found]
    ops = {row.op for run in results.runs for row in run.rows}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text()).render(
        title=title or "Kernel benchmarks", command=command, notes=results.notes, machines=machines,
        files=[path.name for path in results.files], budgets=tables.budgets(measured, ops),
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}",
    ).strip()  # fmt: skip


def _section(machine: Machine) -> dict[str, Any]:
    """What the template shows of one machine."""
    newest = machine.newest()
    followed = [one for one in history.series([machine]) if one.key[4] in plots.OURS]
    counted = [one for name in history.EXACT for one in history.series([machine], name) if one.steps]
    followed += counted
    timed = [entry for entry in newest if entry.row.median_us is not None]
    return {
        "title": machine.title,
        "counts": Counter(entry.row.status for entry in newest),
        "summary": tables.summary(timed),
        "figures": [
            ("Speed-up", plots.speedups(timed)),
            ("Time against size", plots.latency(timed)),
            ("Roofline", plots.roofline(timed, _roofs(machine))),
        ],
        "history": tables.history(followed),
        "histories": plots.history(_worth_drawing(followed), {n: run.command for n, run in machine.runs}),
        "timings": tables.times(timed),
        "errors": tables.errors(newest),
        "failures": tables.failures(newest),
        "fingerprint": tables.fingerprint(machine.fingerprint),
        "runs": tables.runs(machine),
    }


def _worth_drawing(found: Sequence[history.Series]) -> list[history.Series]:
    """Series long enough to tell something, those with steps first, the largest of them foremost."""
    long = [one for one in found if one.steps or len(one.points) >= history.FEWEST]
    size = {id(one): max([0.0, *(abs(step.percent) for step in one.steps)]) for one in long}
    return sorted(long, key=lambda one: -size[id(one)])[:_MOST_HISTORIES]


def _roofs(machine: Machine) -> roofs.Roofs | None:
    """The roofs that the newest run with any holds; of older results, those that this machine still knows."""
    for _, run in reversed(machine.runs):
        if run.roofs:
            with suppress(KeyError, TypeError, ValueError, AttributeError):
                return roofs.Roofs.from_json(run.roofs)
    return roofs.remembered(machine_id(machine.fingerprint))


def _budget_rows(path: Path) -> list[dict[str, Any]]:
    """What `rlhf-kernels budget --json` printed.

    Raises:
        UsageError: the file holds something else.
    """
    try:
        rows = json.loads(path.read_text())
        return [row for row in rows if row["op"] and row["device"] and row["status"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = getattr(error, "strerror", None) or "it is not what `rlhf-kernels budget --json` prints"
        raise UsageError(f"budgets {path} cannot be read: {said}") from None
