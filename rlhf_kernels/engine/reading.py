"""The commands that read stored results and measure nothing."""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_kernels.engine import history as past
from rlhf_kernels.engine import report as pages
from rlhf_kernels.engine import results
from rlhf_kernels.engine.keeping import OK, print_json
from rlhf_kernels.engine.report import plots, svg
from rlhf_kernels.engine.select import UsageError, known, unknown
from rlhf_kernels.engine.show import short
from rlhf_kernels.engine.store import unwritable
from rlhf_kernels.engine.table import print_notes, print_table
from rlhf_kernels.runtime.files import write_aside


def report(args: argparse.Namespace) -> int:
    """Write one HTML page of stored results: no network, no other file.

    Summary, times with their intervals, speed-ups, latency against size, roofline, errors, budgets, the
    machine, and the commands that reproduce each. With --json, what was written where. Needs jinja2 and
    matplotlib: pip install 'rlhf-kernels[report]'.
    """
    if reason := pages.missing():
        raise UsageError(reason)
    if args.out.is_dir():
        raise UsageError(f"--out {args.out} is a directory: expected a file such as report.html")
    if reason := unwritable(args.out):
        raise UsageError(f"--out {args.out} cannot be written: {reason}")
    found = results.load(args.results)
    page = pages.build(found, args.line, args.budget, args.title)
    try:
        write_aside(args.out, page)
    except OSError as error:
        raise UsageError(f"--out {args.out} cannot be written: {error.strerror}") from None
    rows = sum(len(run.rows) for run in found.runs)
    if args.json:
        print_json({"page": str(args.out), "runs": len(found.runs), "rows": rows, "notes": found.notes})
    else:
        print(f"{args.out}: {rows} rows of {len(found.runs)} runs, {len(page) / 1e6:.1f} MB")
    for note in [] if args.json or args.quiet else found.notes:
        print(note, file=sys.stderr)
    return OK


def history(args: argparse.Namespace) -> int:
    """Show how stored times went from run to run, and where they stepped.

    A measurement on one machine is a line: how many runs, its level now, the noise of a run, and each step
    with what changed there: commit, build, versions. --metric speedup or roof follows what was measured
    against another in the same rounds, from which the machine's drift is gone.
    """
    if args.plots and (reason := pages.missing()):
        raise UsageError(reason)
    found = results.load(args.results)
    chosen = _chosen(past.series(found.machines(), args.metric), args)
    if args.plots:
        _draw(chosen, args.plots)
    if args.json:
        print_json([one.to_json() for one in chosen])
        return OK
    show = plots.SHOW[args.metric]
    lines = [
        [*one.key[:3], short(one.key[3]) or one.key[5], one.key[4], one.machine, str(len(one.points)),
         show(one.levels[-1][2]), f"{one.noise:.1%}", one.told]
        for one in chosen
    ]  # fmt: skip
    names = ("op", "case", "dtype", "dir", "implementation", "machine", ">runs", ">level", ">noise", "steps")
    print_table(names, lines, f"History: {args.metric}")
    runs = [f"#{n} is {run.started[:16]} {run.command}" for n, run in enumerate(found.runs, 1)]
    print_notes([*found.notes, *runs, *([f"{len(chosen)} drawings in {args.plots}"] if args.plots else [])])
    return OK


def _chosen(found: Sequence[past.Series], args: argparse.Namespace) -> list[past.Series]:
    """The series that the options name.

    Raises:
        UsageError: nothing was measured twice, or a name that no series has.
    """
    if not found:
        raise UsageError(f"no {args.metric} was measured in two runs of one machine: there is no history yet")
    known("op", args.op, dict.fromkeys(one.key[0] for one in found))
    known("implementation", args.impl, dict.fromkeys(one.key[4] for one in found))
    cases = dict.fromkeys(one.key[1] for one in found)
    for pattern in args.case:
        if not fnmatch.filter(cases, pattern):
            raise unknown("case", pattern, cases)
    return [
        one
        for one in found
        if (not args.op or one.key[0] in args.op)
        and (not args.impl or one.key[4] in args.impl)
        and (not args.case or any(fnmatch.fnmatch(one.key[1], pattern) for pattern in args.case))
    ]


def _draw(chosen: Sequence[past.Series], directory: Path) -> None:
    """An SVG file a series, in the colours of a light page.

    Raises:
        UsageError: the directory cannot be written.
    """
    for one, drawn in zip(chosen, plots.history(chosen, {})):
        name = re.sub(r"[^A-Za-z0-9._+-]+", "_", f"{one.machine} {one.title}")
        try:
            write_aside(directory / f"{name}.svg", svg.standalone(drawn.svg))
        except OSError as error:
            raise UsageError(f"--plots {directory} cannot be written: {error.strerror}") from None
