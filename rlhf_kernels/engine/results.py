"""Stored runs of one or many files, by machine, and the newest row of each measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_kernels.engine import store
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.select import UsageError

# What makes two results those of one machine: versions may change on it, and a history shows where.
_HARDWARE = ("device", "processor", "flags", "cores", "gpu", "threads")


@dataclass(frozen=True)
class Entry:
    """A row and the run that it comes from; `number` counts the runs of all files, oldest first, from 1."""

    row: Row
    run: store.Run
    number: int


@dataclass
class Machine:
    """The runs of one machine and number of threads, oldest first.

    Attributes:
        fingerprint: of the newest run.
        runs: (number, run).
    """

    fingerprint: dict[str, Any]
    runs: list[tuple[int, store.Run]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """'AMD EPYC, 1 thread' or 'NVIDIA H200'."""
        found, threads = self.fingerprint, self.fingerprint.get("threads") or 1
        if found.get("gpu"):
            return str(found["gpu"])
        name = f"{found.get('processor') or 'an unnamed processor'}"
        return f"{name}, {threads} thread{'s' * (threads != 1)}"

    def entries(self) -> Iterator[Entry]:
        """Every row, oldest first."""
        for number, run in self.runs:
            for row in run.rows:
                yield Entry(row, run, number)

    def newest(self) -> list[Entry]:
        """The newest row of each measurement, ordered by op, case, dtype, direction; budgets are left out.

        The rows of `check` and of `bench` share their names and are kept apart: a later check does not hide
        a time.
        """
        found: dict[tuple[Any, ...], Entry] = {}
        timed = {number for number, run in self.runs if any(row.median_us for row in run.rows)}
        for entry in self.entries():
            if not entry.row.figures:
                found[(*entry.row.key, entry.number in timed)] = entry
        return sorted(found.values(), key=lambda e: (e.row.op, e.row.case, e.row.dtype, e.row.direction))

    def budgets(self) -> list[dict[str, Any]]:
        """The newest row of each budgeted kernel, as `rlhf-kernels budget --json` prints it."""
        found = {entry.row.key: entry.row for entry in self.entries() if entry.row.figures}
        names = ("op", "impl", "case", "device", "status", "reason")
        return [
            {name: getattr(row, name) for name in names} | row.figures | row.notes for row in found.values()
        ]


@dataclass
class Results:
    """What files hold.

    Attributes:
        files: those that were read.
        runs: all, oldest first.
        notes: what could not be read, one sentence each.
    """

    files: list[Path]
    runs: list[store.Run]
    notes: list[str]

    def machines(self) -> list[Machine]:
        """The runs by machine, that with the most rows first."""
        found: dict[tuple[str, ...], Machine] = {}
        for number, run in enumerate(self.runs, 1):
            key = tuple(str(run.fingerprint.get(name)) for name in _HARDWARE)
            machine = found.setdefault(key, Machine(run.fingerprint))
            machine.fingerprint = run.fingerprint
            machine.runs.append((number, run))
        return sorted(found.values(), key=lambda m: -sum(len(run.rows) for _, run in m.runs))


def load(paths: Sequence[Path]) -> Results:
    """Reads result files, and every *.jsonl of a directory.

    Raises:
        UsageError: a path does not exist or holds no result, or a run is of a later schema.
    """
    files, runs, notes = [], [], []
    for path, named in _files(paths):
        try:
            found, broken = store.read(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UsageError(f"{path} is not a file of JSON lines, as --out of bench writes them") from None
        except ValueError as error:
            raise UsageError(str(error)) from None
        except (KeyError, TypeError) as error:
            raise UsageError(f"{path} holds a run or row that lacks a field: {error}") from None
        if not found:
            if named:
                raise UsageError(f"{path} holds no run: expected JSON lines, as --out of bench writes them")
            notes.append(f"{path.name} holds no run and was left out.")
            continue
        if broken:
            notes.append(f"{path.name}: {broken} line{'s' * (broken > 1)} could not be read.")
        files.append(path)
        runs += found
    # An older revision measured again, beside its head: what it was on its day is another run.
    again = sum(run.side == "base" for run in runs)
    if again:
        notes.append(f"{again} of {len(runs)} runs are the base of `regress` and were left out.")
    runs = [run for run in runs if run.side != "base"]
    if not runs:
        raise UsageError(f"no result in {', '.join(map(str, paths))}: expected *.jsonl files of bench --out")
    incomplete = sum(not run.complete for run in runs)
    if incomplete:
        notes.append(f"{incomplete} of {len(runs)} runs ended early; what they had measured is shown.")
    return Results(files, sorted(runs, key=lambda run: run.started), notes)


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Files, and whether each was named itself."""
    for path in paths:
        if path.is_dir():
            yield from ((file, False) for file in sorted(path.glob("*.jsonl")))
        elif path.exists():
            yield path, True
        else:
            raise UsageError(
                f"{path} does not exist: expected a result file or a directory of such; --op names ops"
            )


def commands(entries: Iterable[Entry]) -> list[str]:
    """What was typed to measure these, newest last, each once."""
    runs = {entry.number: entry.run.command for entry in entries}
    return list(dict.fromkeys(runs[number] for number in sorted(runs)))
