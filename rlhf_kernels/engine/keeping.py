"""What a command leaves behind: its exit code, what it prints for machines, the file of --out, and what was
measured where it ends early."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlhf_kernels.engine import store, table
from rlhf_kernels.engine.conditions import WorkerError
from rlhf_kernels.engine.select import UsageError
from rlhf_kernels.engine.store import unwritable

OK, REGRESSION, INCORRECT, ENVIRONMENT, USAGE, SOFTWARE, AGAIN = 0, 1, 2, 3, 64, 70, 75
INTERRUPTED = 130


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=1, allow_nan=False))


def write(args: argparse.Namespace, *runs: store.Run) -> None:
    """Appends runs to --out; what cannot be written there is kept where temporary files are. Runs that were
    stopped before their first row are not written.

    Raises:
        UsageError: it could not be written; the text says where it is instead.
    """
    if not args.out:
        return
    count = sum(len(run.rows) + len(run.outcomes) for run in runs)
    if not count:
        print(f"no row was finished: nothing appended to {args.out}", file=sys.stderr)
        return
    try:
        for run in runs:
            store.append(args.out, run)
    except OSError as error:
        kept = Path(tempfile.gettempdir()) / f"rlhf-kernels-{runs[0].session}.jsonl"
        where = f"kept in {kept}"
        try:
            for run in runs:
                store.append(kept, run)
        except OSError:
            if not args.json:
                print_json([run.to_json() for run in runs])
            where = "printed above"
        raise UsageError(f"--out {args.out}: {error.strerror}; the {count} rows are {where}") from None
    print(f"{count} rows appended to {args.out}", file=sys.stderr)


def check_out(args: argparse.Namespace) -> None:
    """Refuses an --out that cannot be written, before anything is measured.

    Raises:
        UsageError: it is a directory, or no file can be made or changed there.
    """
    if args.out and args.out.is_dir():
        raise UsageError(f"--out {args.out} is a directory: expected a file such as results.jsonl")
    if args.out and (reason := unwritable(args.out)):
        raise UsageError(f"--out {args.out} cannot be written: {reason}")


class Keeping:
    """Ends a measurement where it is interrupted or its process dies, and keeps what there is."""

    def __init__(self, run: store.Run) -> None:
        self.run = run
        self.code = OK

    def __enter__(self) -> Keeping:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if kind not in (KeyboardInterrupt, WorkerError):
            return False
        self.run.complete = False
        self.code = INTERRUPTED if kind is KeyboardInterrupt else SOFTWARE
        table.complain(f"{str(error) or 'interrupted'}: what follows is what was measured so far")
        return True
