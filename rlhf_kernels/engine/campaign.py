"""What a command does over many measurements: checks in this process, timings and tuning in others.

Each is a generator of rows or outcomes as they come, so that an interrupted command keeps what it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_kernels.engine.bench import DIRECTIONS, merged
from rlhf_kernels.engine.check import Judge, check_case, unmade
from rlhf_kernels.engine.clock import Limits
from rlhf_kernels.engine.conditions import work
from rlhf_kernels.engine.implementations import EAGER
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.select import Measurement
from rlhf_kernels.engine.tune import Outcome

# Told what is going on: how far it is, of how much, and what is next.
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Place:
    """Where and how things are measured."""

    device: str = "cpu"
    threads: int = 1
    limits: Limits = dataclasses.field(default_factory=Limits)
    package: str = "rlhf_kernels.ops"

    def request(self, command: str, measurements: Sequence[Measurement], **more: Any) -> dict[str, Any]:
        """What the measuring process is asked."""
        return {
            "command": command, "device": self.device, "threads": self.threads, "package": self.package,
            "limits": dataclasses.asdict(self.limits), "measurements": [m.names for m in measurements],
            **more,
        }  # fmt: skip


def check(
    measurements: Sequence[Measurement], backends: Sequence[str], place: Place, tell: Tell
) -> Iterator[Row]:
    """Every backend of each op that is declared for the device, or those named; the definition is not one."""
    for number, m in enumerate(measurements):
        tell(number, len(measurements), " ".join(m.names))
        declared = m.spec.op.declared()
        wanted = [b for b in backends if b in declared] or [b for b in declared if b != "reference"]
        wanted = [] if backends and not set(backends) & set(declared) else wanted
        try:
            judge = Judge(m.spec, m.case, m.dtype, place.device)
        except Exception as error:  # whatever a spec raises is its result
            for backend in wanted:
                yield unmade(m.spec, m.case, m.dtype, backend, place.device, error)
            continue
        for backend in wanted:
            yield from check_case(m.spec, m.case, m.dtype, backend, place.device, judge=judge)
    tell(len(measurements), len(measurements), "done")


def bench(
    measurements: Sequence[Measurement],
    wanted: Sequence[str],
    place: Place,
    tell: Tell,
    processes: int = 1,
    baseline: str = EAGER,
    rows: dict[tuple[str, ...], list[Row]] | None = None,
) -> list[Row]:
    """Times in `processes` fresh processes, one after the other; `rows` gathers what came, by key.

    Raises:
        WorkerError: a process failed.
    """
    gathered = {} if rows is None else rows
    total, number = len(measurements) * processes, 0
    for process in range(processes):
        request = place.request(
            "bench", measurements, wanted=list(wanted), baseline=baseline, directions=DIRECTIONS
        )
        for event in work(request, place.threads):
            if event["event"] == "start":
                which = f" (process {process + 1} of {processes})" if processes > 1 else ""
                tell(number, total, f"{event['op']} {event['case']} {event['dtype']}{which}")
                number += 1
            elif event["event"] == "row":
                row = Row.from_json(event["row"])
                gathered.setdefault(row.key, []).append(row)
    tell(total, total, "done")
    return gather(gathered)


def gather(rows: Mapping[tuple[str, ...], list[Row]]) -> list[Row]:
    """One row a measurement, of all processes together."""
    return [merged(found) for found in rows.values()]


def tune(
    measurements: Sequence[Measurement], backends: Sequence[str], place: Place, tell: Tell
) -> Iterator[Outcome]:
    """Tunes the knobs of these backends.

    Raises:
        WorkerError: the measuring process failed.
    """
    number = 0
    request = place.request("tune", measurements, wanted=list(backends))
    for event in work(request, place.threads):
        if event["event"] == "start":
            tell(number, len(measurements), f"{event['op']} {event['case']} {event['dtype']}")
            number += 1
        elif event["event"] == "outcome":
            outcome = Outcome(**event["outcome"])
            outcome.shape = tuple(outcome.shape)
            yield outcome
    tell(len(measurements), len(measurements), "done")
