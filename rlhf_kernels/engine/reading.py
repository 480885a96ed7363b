"""The commands that read stored results and measure nothing."""

from __future__ import annotations

import argparse
import sys

from rlhf_kernels.engine import report as pages
from rlhf_kernels.engine import results
from rlhf_kernels.engine.commands import OK, print_json
from rlhf_kernels.engine.select import UsageError
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
