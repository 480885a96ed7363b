"""Results to compare with: a file, or a baseline kept by name in <cache>/baselines.

`bench --save-baseline main --runs 5` keeps five runs of the same code: how they differ is the machine's
noise, which `compare main head.jsonl` reads from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf_kernels.engine import store
from rlhf_kernels.engine.select import UsageError
from rlhf_kernels.engine.store import Run
from rlhf_kernels.runtime.files import cache_directory, locked, write_aside

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def path_of(name: str) -> Path:
    """Where a baseline of this name is kept.

    Raises:
        UsageError: the name is not one word of letters, digits, dots, dashes and underscores.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"a baseline cannot be named {name!r}: expected letters, digits, '.', '-' and '_'")
    return cache_directory() / "baselines" / f"{name}.jsonl"


def save(name: str, runs: Sequence[Run]) -> Path:
    """Keeps runs as the baseline of this name, in place of what it was.

    Raises:
        UsageError: see `path_of`; or the file cannot be written.
    """
    path = path_of(name)
    lines = [json.dumps(line, allow_nan=False) for run in runs for line in store.lines(run)]
    try:
        with locked(path):
            return write_aside(path, "".join(line + "\n" for line in lines))
    except OSError as error:
        raise UsageError(f"the baseline {name} cannot be written: {error.strerror}: {path}") from None


def names() -> list[str]:
    """The baselines there are."""
    return sorted(path.stem for path in (cache_directory() / "baselines").glob("*.jsonl"))


def load(name: str) -> tuple[list[Run], list[str]]:
    """The runs of a result file, or of the baseline of that name, and sentences about what was left out.

    Raises:
        UsageError: there is neither, or nothing in it can be read.
    """
    path = Path(name)
    if not path.exists():
        if not _NAME.fullmatch(name) or path.suffix or not path_of(name).exists():
            there = ", ".join(names()) or "none yet: rlhf-kernels bench ... --save-baseline NAME"
            raise UsageError(f"there is no result file and no baseline {name!r}; baselines: {there}")
        path = path_of(name)
    try:
        runs, broken = store.read(path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not any(run.rows for run in runs):
        why = f"{broken} of its lines cannot be read" if broken else "it is empty"
        raise UsageError(f"{path} holds no results: {why}")
    notes = []
    if broken:
        notes.append(f"Careful: {broken} lines of {path} are broken and were left out.")
    if stopped := [run for run in runs if not run.complete]:
        notes.append(f"Careful: {len(stopped)} of {len(runs)} runs in {path} were interrupted.")
    return runs, notes
