"""Measures two builds of one code by turns: two processes live side by side and take one sample each, again
and again, in an order drawn by lot.

A machine that others use is 20 % slower one minute than the next, and every process has a memory layout of
its own. So what is compared lies milliseconds apart, and processes come in pairs, several of them.

    turns = Turns({"base": Side(...), "head": Side(...)}, place)
    for number in range(10):
        turns.pair(number, targets, tell)
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_kernels.engine import stats
from rlhf_kernels.engine.bench import merged
from rlhf_kernels.engine.campaign import Place
from rlhf_kernels.engine.conditions import WorkerError, conditions
from rlhf_kernels.engine.row import Row

_WORKER = Path(__file__).with_name("turns_worker.py")
SIDES = ("base", "head")
# A sample: long against the clock and a change of turns, short against what else happens on a machine.
_SAMPLE_SECONDS = 0.001
# How many places the data lies in, in one process, and bytes that are taken before each move at most.
_PLACES, _GAP = 10, 1 << 21


class Target(NamedTuple):
    """What is measured on both sides."""

    op: str
    case: str
    dtype: str
    direction: str
    impl: str


@dataclass(frozen=True)
class Side:
    """Where one side's code is.

    Attributes:
        directory: the process starts there.
        paths: what comes first on its module search path.
        environment: further variables.
        package: of the specs, where it is not the place's: a file lies elsewhere on each side.
    """

    directory: Path
    paths: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    package: str | None = None


class Worker:
    """A process that takes samples on demand.

    Raises:
        WorkerError: from every method, with the process's last words.
    """

    def __init__(self, side: Side, place: Place) -> None:
        paths = [*map(str, side.paths), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | conditions(place.threads) | dict(side.environment)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115  close() closes it
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER.read_text()], cwd=side.directory, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words,
            start_new_session=True,  # Ctrl-C is for the parent, which keeps what there is
        )  # fmt: skip
        package = side.package or place.package
        self._send({"device": place.device, "threads": place.threads, "package": package})

    def ask(self, do: str, **content: Any) -> dict[str, Any]:
        """One request and its answer."""
        self._send({"do": do, **content})
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        raise self._died()

    def _send(self, value: Mapping[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _died(self) -> WorkerError:
        code = self._process.wait()
        self._words.seek(0)
        last = self._words.read().strip().splitlines()[-1:] or ["no message"]
        return WorkerError(f"a measuring process ended with {code}: {last[0]}")

    def close(self) -> None:
        """Ends the process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._words):
            with suppress(BrokenPipeError):  # of what a process that is gone never read
                pipe.close()


Tell = Callable[[Target], None]


@dataclass
class Turns:
    """Both sides, and their rows so far.

    Args:
        sides: by SIDES.
        place: device, threads, package of the specs.
        seconds: for the rounds of one target in one pair of processes.
        rounds: the least of them.
        seed: of all that is drawn by lot.
    """

    sides: Mapping[str, Side]
    place: Place
    seconds: float = 0.3
    rounds: int = 20
    seed: int = 0
    hello: dict[str, dict[str, Any]] = field(default_factory=dict)
    _rows: dict[str, dict[Target, list[Row]]] = field(
        default_factory=lambda: {side: defaultdict(list) for side in SIDES}
    )

    def rows(self, side: str) -> list[Row]:
        """One row a target, of all processes together."""
        return [merged(rows) for rows in self._rows[side].values()]

    def pair(self, number: int, targets: Sequence[Target], tell: Tell = lambda target: None) -> None:
        """Measures targets in two new processes; the first pair also checks, and drops what is not ok.

        Raises:
            WorkerError: one of the processes died; finished targets are kept.
        """
        draw = random.Random(f"{self.seed} {number}")
        workers: dict[str, Worker] = {}
        try:
            for side in draw.sample(SIDES, 2):
                workers[side] = Worker(self.sides[side], self.place)
            self.hello = {side: workers[side].ask("hello") for side in SIDES}
            for target in draw.sample(targets, len(targets)):
                if not any(row.status != "ok" for side in SIDES for row in self._rows[side][target]):
                    tell(target)
                    self._target(workers, target, draw)
        finally:
            for worker in workers.values():
                worker.close()

    def _target(self, workers: Mapping[str, Worker], target: Target, draw: random.Random) -> None:
        check = not self._rows["base"][target]
        answers = {
            side: workers[side].ask("prepare", target=target, check=check) for side in draw.sample(SIDES, 2)
        }
        rows = {side: Row.from_json(answers[side]["row"]) for side in SIDES}
        if all("seconds" in answers[side] for side in SIDES):
            slower = max(answers[side]["seconds"] for side in SIDES)
            samples = self._rounds(workers, math.ceil(_SAMPLE_SECONDS / slower), draw)
            rows = {side: _timed(rows[side], samples[side], answers[side]["work"]) for side in SIDES}
        for side in SIDES:
            self._rows[side][target].append(rows[side])

    def _rounds(
        self, workers: Mapping[str, Worker], batch: int, draw: random.Random
    ) -> dict[str, list[float]]:
        """Seconds of one call by rounds; both sides make as many calls a sample.

        Where in memory the data lies decides some percent of a time. So the processes move it now and then.
        """
        samples: dict[str, list[float]] = {side: [] for side in SIDES}
        for place in range(_PLACES):
            for side in draw.sample(SIDES, 2) if place else ():
                workers[side].ask("move", gap=draw.randrange(_GAP))
            start, least = time.perf_counter(), self.rounds * (place + 1) / _PLACES
            while len(samples["base"]) < least or time.perf_counter() - start < self.seconds / _PLACES:
                for side in draw.sample(SIDES, 2):
                    samples[side].append(workers[side].ask("sample", batch=batch)["seconds"])
        return samples


def _timed(row: Row, samples: list[float], work: Mapping[str, float]) -> Row:
    seconds = stats.median(samples)
    low, high = stats.median_ci(samples)
    return replace(
        row, median_us=seconds * 1e6, ci_us=(low * 1e6, high * 1e6), gbps=work["bytes"] / seconds / 1e9,
        tflops=work["flops"] / seconds / 1e12, flops=work["flops"], bytes=work["bytes"],
        samples_us=[[s * 1e6 for s in samples]],
    )  # fmt: skip


def pairs_needed(targets: int, level: float = 0.05) -> int:
    """How many pairs of processes let the signed-rank test see a change in one of so many targets.

    All signs alike have p = 2 / 2^pairs; half of the level over the targets leaves room for a stray.
    """
    return max(8, math.ceil(math.log2(2 * max(targets, 1) / (level / 2))))
