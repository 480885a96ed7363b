"""Finds the best values of the knobs that a spec declares, for one op, backend, case and dtype at a time.

Every candidate is checked before it is timed. All are timed side by side, then the best few once more beside
the default, which always competes: another value wins only where the interval of its speed-up lies above
`LEAST_GAIN`. The default is written down as well where it wins, so that a near shape finds it. A backend that
is not the first choice on its device is then held, with its best values, against the one that is.
`runtime.tuned` reads the answers back.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rlhf_kernels.engine import stats
from rlhf_kernels.engine.bench import BOTH, FORWARD, call_of
from rlhf_kernels.engine.check import Judge, why_unmade
from rlhf_kernels.engine.clock import Clock, Contender, Limits, measure
from rlhf_kernels.engine.implementations import Implementation
from rlhf_kernels.engine.row import dtype_name
from rlhf_kernels.engine.spec import Case, Knob, OpSpec
from rlhf_kernels.runtime import tuned
from rlhf_kernels.runtime.dispatch import backend as use_backend
from rlhf_kernels.runtime.dispatch import trial
from rlhf_kernels.runtime.files import locked, write_aside

LEAST_GAIN = 1.02
FINALISTS = 3
Values = dict[str, int]


@dataclass
class Outcome:
    """What tuning one function of a kernel at one case found.

    Attributes:
        op, backend, function, case, dtype: what was tuned.
        values, default: the best values, and those that it does without a table.
        gain: time with the default over time with `values`.
        timings_us: values as text -> median of all their samples.
        refused: values as text -> why their check failed.
        shape: the class of shapes that the kernel saw.
    """

    op: str
    backend: str
    function: str
    case: str
    dtype: str
    values: Values
    default: Values
    gain: float = 1.0
    timings_us: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    shape: tuned.ShapeClass = (0, 0)

    def entry(self, device: str, threads: int) -> dict[str, Any]:
        """The line of the table."""
        return {
            "op": self.op, "backend": self.backend, "function": self.function,
            "device": tuned.table_device(device), "threads": threads,
            "dtype": self.dtype, "class": list(self.shape), "case": self.case,
            "values": self.values, "default": self.default, "gain": round(self.gain, 3),
            "timings_us": self.timings_us, "versions": tuned.versions(self.backend),
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip


def text(values: Mapping[str, int]) -> str:
    """'grain=4096'."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def candidates(knobs: Sequence[Knob]) -> list[Values]:
    """Every combination of the knobs' candidates, the defaults first."""
    return [
        dict(zip((knob.name for knob in knobs), values))
        for values in itertools.product(*(knob.candidates for knob in knobs))
    ]


def tunable(spec: OpSpec, device: str) -> list[str]:
    """The backends of an op that have knobs and can be timed on this device."""
    backends = dict.fromkeys(knob.backend for knob in spec.knobs)
    # The interpreter's times say nothing, and the CUDA extension heeds no knob.
    return [name for name in backends if (name == "native") == (device == "cpu")]


@dataclass
class Tuner:
    """Tunes one backend of an op at one case and dtype.

    Args:
        spec, case, dtype, backend, device: what.
        clock, limits: with what, and how long a round of timings may take.
    """

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    backend: str
    device: torch.device
    clock: Clock
    limits: Limits = field(default_factory=Limits)

    def outcomes(self) -> Iterator[Outcome]:
        """Tunes the forward, then the backward with the best forward, then holds it against the first choice.

        Nothing where this backend cannot serve; where there are no inputs, the default is refused.
        """
        try:
            judge = Judge(self.spec, self.case, self.dtype, self.device)
        except Exception as error:  # whatever a spec raises is its result
            default = candidates([knob for knob in self.spec.knobs if knob.backend == self.backend])[0]
            outcome = self._outcome("forward", default)
            outcome.refused[text(default)] = f"error: {why_unmade(error)}"
            yield outcome
            return
        held: list[tuned.Trial] = []
        shape = None
        for function in tuned.FUNCTIONS[: len(judge.directions)]:
            own = [k for k in self.spec.knobs if k.backend == self.backend and function in k.functions]
            if own and hasattr(self.spec.op.module(self.backend), function):
                outcome = self._tune(judge, function, candidates(own), held)
                if not outcome.timings_us:
                    if outcome.refused:
                        yield outcome
                    return
                held.append(self._trial(function, outcome.values))
                shape = shape or outcome.shape
                yield outcome
        first = self.spec.op.backends(self.device.type)[0]
        if (
            held
            and first != self.backend
            and self.spec.op.unsupported(first, self.device.type, self.dtype) is None
        ):
            yield self._contest(judge, held, first, shape)

    def _contest(self, judge: Judge, held: list[tuned.Trial], first: str, shape: tuned.ShapeClass) -> Outcome:
        """Whether this backend is faster than the first choice, forward and with the backward."""
        no, yes = {tuned.CHOSEN: 0}, {tuned.CHOSEN: 1}
        outcome = replace(self._outcome(tuned.CHOICE, no), values=yes, gain=float("inf"), shape=shape)
        for direction in (FORWARD, BOTH)[: len(judge.directions)]:
            contenders = []
            for name, values, trials in ((first, no, ()), (self.backend, yes, held)):
                context = self._holding(name, trials)
                with context():
                    call = call_of(Implementation(name, self.spec.function), judge, direction)
                contenders.append(Contender(text(values), call, context))
            samples = measure(contenders, self.clock, self.limits)
            base, head = samples[text(no)], samples[text(yes)]
            outcome.timings_us = {name: round(stats.median(s) * 1e6, 3) for name, s in samples.items()}
            outcome.gain = min(outcome.gain, stats.median(base) / stats.median(head))
            if stats.ratio_ci(base, head)[0] <= LEAST_GAIN:
                outcome.values = no
        return outcome

    def _outcome(self, function: str, default: Values) -> Outcome:
        """What is known before anything was timed."""
        names = (self.spec.name, self.backend, function, self.case.name, dtype_name(self.dtype))
        return Outcome(*names, default, default)

    def _tune(self, judge: Judge, function: str, options: list[Values], held: list[tuned.Trial]) -> Outcome:
        default = options[0]
        outcome = self._outcome(function, default)
        fit = [values for values in options if self._fits(judge, function, values, held, outcome)]
        outcome.shape = tuned.Tried.seen.get((self.spec.name, self.backend, function), (0, 0))
        if default not in fit:
            return outcome
        samples = self._time(judge, function, fit, held)
        ranked = sorted(fit, key=lambda values: stats.median(samples[text(values)]))
        final = [default, *(values for values in ranked[:FINALISTS] if values != default)]
        if len(final) > 1:
            for name, more in self._time(judge, function, final, held).items():
                samples[name] = more
        outcome.timings_us = {name: round(stats.median(s) * 1e6, 3) for name, s in samples.items()}
        base = samples[text(default)]
        for values in final[1:]:
            head = samples[text(values)]
            gain = stats.median(base) / stats.median(head)
            if gain > outcome.gain and stats.ratio_ci(base, head)[0] > LEAST_GAIN:
                outcome.values, outcome.gain = values, gain
        return outcome

    def _fits(
        self, judge: Judge, function: str, values: Values, held: list[tuned.Trial], outcome: Outcome
    ) -> bool:
        """Whether the kernel is right with these values; notes why not, unless it cannot serve at all."""
        with self._trying(function, values, held)():
            rows = judge.rows(self.backend, self.spec.function, [function])
        bad = [row for row in rows if row.status != "ok"]
        if bad and bad[0].status != "unavailable":
            outcome.refused[text(values)] = f"{bad[0].status}: {bad[0].reason}"
        return not bad

    def _time(
        self, judge: Judge, function: str, options: list[Values], held: list[tuned.Trial]
    ) -> dict[str, list[float]]:
        one = Implementation(self.backend, self.spec.function)
        direction = FORWARD if function == "forward" else BOTH
        contenders = []
        for values in options:
            context = self._trying(function, values, held)
            with context():
                contenders.append(Contender(text(values), call_of(one, judge, direction), context))
        return measure(contenders, self.clock, self.limits)

    def _trial(self, function: str, values: Values) -> tuned.Trial:
        return tuned.Trial(self.spec.name, self.backend, function, tuple(values.items()))

    def _trying(
        self, function: str, values: Values, held: list[tuned.Trial]
    ) -> Callable[[], AbstractContextManager[None]]:
        """Holds the backend and the values; `held` are those of the functions tuned before."""
        return self._holding(self.backend, (*held, self._trial(function, values)))

    def _holding(
        self, backend: str, trials: Sequence[tuned.Trial]
    ) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def context() -> Iterator[None]:
            with use_backend(f"{self.spec.name}={backend}", strict=True), trial(*trials):
                yield

        return context


_KEY = ("op", "backend", "function", "device", "threads", "dtype", "class")


def _key(entry: Mapping[str, Any]) -> list[Any]:
    """What an entry takes the place of; a choice of backend stands for its case, whose options may matter."""
    names = (*_KEY, "case") if entry["function"] == tuned.CHOICE else _KEY
    return [entry[name] for name in names]


def store(entry: Mapping[str, Any], path: Path | None = None) -> Path:
    """Merges one entry into the table as it is now, in place of one for the same op, device and shapes."""
    path = path or tuned.table_path()
    with locked(path):
        kept = [old for old in tuned.read_table(path) if _key(old) != _key(entry)]
        lines = [json.dumps(one) for one in [*kept, dict(entry)]]
        body = ",\n".join(f"  {line}" for line in lines)
        write_aside(path, f'{{\n "schema": {tuned.SCHEMA},\n "entries": [\n{body}\n ]\n}}\n')
    tuned.forget()
    return path
