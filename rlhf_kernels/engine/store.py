"""Results as JSON lines: a line that describes the run, then one line a row; files are only appended to.

A run is written in one piece under a lock on the file. A line that a crash left half written is skipped and
counted.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from typing import Any

from rlhf_kernels.engine.row import SCHEMA, Row
from rlhf_kernels.runtime.files import fcntl


@dataclass
class Run:
    """What one command measured.

    Attributes:
        command: how to repeat it.
        fingerprint: machine, versions and build.
        rows: the results.
        outcomes: what `tune` found, as JSON values.
        roofs: of the machine, as `bench` measured them (`roofs.Roofs` in JSON values); else empty.
        started: UTC, ISO 8601.
        complete: whether it was left to finish.
        session: shared by the runs of one command: several of the same code show the machine's noise, and the
            two sides of `regress` were measured by turns, process by process.
        side: base or head, of a run of `regress`.
    """

    command: str
    fingerprint: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    started: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    complete: bool = True
    session: str = field(default_factory=lambda: secrets.token_hex(6))
    side: str = ""
    roofs: dict[str, Any] = field(default_factory=dict)

    def header(self) -> dict[str, Any]:
        """The line before the rows."""
        found = {
            "kind": "run", "schema": SCHEMA, "command": self.command, "started": self.started,
            "complete": self.complete, "session": self.session, "side": self.side,
            "fingerprint": self.fingerprint,
        }  # fmt: skip
        return found | ({"roofs": self.roofs} if self.roofs else {})

    def to_json(self) -> dict[str, Any]:
        """Header and rows as one value."""
        return self.header() | {"rows": [row.to_json() for row in self.rows], "outcomes": self.outcomes}


def lines(run: Run) -> list[dict[str, Any]]:
    """What stands in a file for a run, one JSON value a line."""
    rows = [{"kind": "row"} | row.to_json() for row in run.rows]
    return [run.header(), *rows, *({"kind": "outcome"} | outcome for outcome in run.outcomes)]


def append(path: Path, run: Run) -> None:
    """Adds a run to a file of JSON lines, all or nothing; starts a line of its own behind a broken one.

    Raises:
        OSError: the file cannot be written; it is as it was.
    """
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines(run))
    with _held(path) as file:
        if end := file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        try:
            rest = memoryview(text.encode())
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:  # a full disk: no half of a run stays behind
            file.truncate(end)
            if not end:
                path.unlink()
            raise


@contextmanager
def _held(path: Path) -> Iterator[FileIO]:
    """The file, open to append, while no other process appends to it; made where there is none.

    The lock is on the file itself, so that none stays behind beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("ab+", buffering=0) as file:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held it may have removed the file: see `append`.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield file
                return


def unwritable(path: Path) -> str:
    """Why no file can be made there, or empty; leaves nothing behind. Directories may still be missing."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    try:
        if there.is_dir():
            with tempfile.TemporaryDirectory(prefix=".rlhf-kernels-", dir=there):
                return ""
        with path.open("ab"):
            return ""
    except OSError as error:
        return f"{error.strerror}: {there}"


def read(path: Path) -> tuple[list[Run], int]:
    """The runs of a file and how many lines of it could not be read.

    Raises:
        ValueError: there is no such file, or it is no text, or a run in it is of a later schema.
    """
    runs: list[Run] = []
    broken = 0
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    for line in text.splitlines():
        try:
            value = json.loads(line)
            kind = value["kind"]
        except (ValueError, KeyError, TypeError):
            broken += bool(line.strip())
            continue
        if kind == "run":
            runs.append(_run(path, value))
        elif kind == "row" and runs:
            try:
                runs[-1].rows.append(Row.from_json(value))
            except (TypeError, ValueError):
                broken += 1
        elif kind == "outcome" and runs:
            runs[-1].outcomes.append({name: item for name, item in value.items() if name != "kind"})
    return runs, broken


def _run(path: Path, value: dict[str, Any]) -> Run:
    schema = value.get("schema")
    if not isinstance(schema, int):
        raise ValueError(f"{path} holds schema {schema!r}: expected a number up to {SCHEMA}")
    if schema > SCHEMA:
        raise ValueError(
            f"{path} holds schema {schema}, this version reads up to {SCHEMA}: upgrade rlhf-kernels"
        )
    known = {"command": "", "fingerprint": {}, "started": "", "complete": False, "roofs": {}}
    run = Run(**{name: value.get(name, default) for name, default in known.items()})
    # Runs from before sessions stand alone.
    run.session, run.side = value.get("session") or run.session, value.get("side", "")
    return run
