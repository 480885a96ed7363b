"""Results as JSON lines: a line that describes the run, then one line a row; files are only appended to.

A run is written in one piece under a lock. A line that a crash left half written is skipped and counted.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlhf_kernels.engine.row import SCHEMA, Row
from rlhf_kernels.runtime.files import locked


@dataclass
class Run:
    """What one command measured.

    Attributes:
        command: how to repeat it.
        fingerprint: machine, versions and build.
        rows: the results.
        outcomes: what `tune` found, as JSON values.
        started: UTC, ISO 8601.
        complete: whether it was left to finish.
    """

    command: str
    fingerprint: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    complete: bool = True

    def header(self) -> dict[str, Any]:
        """The line before the rows."""
        return {
            "kind": "run", "schema": SCHEMA, "command": self.command, "started": self.started,
            "complete": self.complete, "fingerprint": self.fingerprint,
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Header and rows as one value."""
        return self.header() | {"rows": [row.to_json() for row in self.rows], "outcomes": self.outcomes}


def append(path: Path, run: Run) -> None:
    """Adds a run to a file of JSON lines, in one write; starts a line of its own behind a broken one."""
    lines = [run.header(), *({"kind": "row"} | row.to_json() for row in run.rows)]
    lines += [{"kind": "outcome"} | outcome for outcome in run.outcomes]
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    with locked(path), path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> tuple[list[Run], int]:
    """The runs of a file and how many lines of it could not be read.

    Raises:
        ValueError: a run is of a later schema.
    """
    runs: list[Run] = []
    broken = 0
    for line in path.read_text().splitlines():
        try:
            value = json.loads(line)
            kind = value["kind"]
        except (ValueError, KeyError, TypeError):
            broken += bool(line.strip())
            continue
        if kind == "run":
            runs.append(_run(path, value))
        elif kind == "row" and runs:
            runs[-1].rows.append(Row.from_json(value))
        elif kind == "outcome" and runs:
            runs[-1].outcomes.append({name: item for name, item in value.items() if name != "kind"})
    return runs, broken


def _run(path: Path, value: dict[str, Any]) -> Run:
    if value["schema"] > SCHEMA:
        raise ValueError(
            f"{path} holds schema {value['schema']}, this version reads up to {SCHEMA}: upgrade rlhf-kernels"
        )
    names = ("command", "fingerprint", "started", "complete")
    return Run(**{name: value[name] for name in names})
