"""The process of one side of `regress`: prepares one measurement at a time, and takes a sample when told to.

turns.py hands this source to an interpreter in the environment of either revision, so that both are asked in
the same way; specs, checks and clock are those of the revision. One JSON line a request, one an answer.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from rlhf_kernels.engine import implementations as known
from rlhf_kernels.engine.bench import Bench, call_of, costs_of
from rlhf_kernels.engine.check import Judge
from rlhf_kernels.engine.clock import Contender, Limits, clock_for, measure
from rlhf_kernels.engine.fingerprint import fingerprint
from rlhf_kernels.engine.roofs import Roofs
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.spec import load_specs

try:
    import resource
except ImportError:  # Windows
    resource = None

_TRIES = 3
# Bytes of inputs that are moved at most.
_MOVED = 64 << 20
_WARM_UP = Limits(seconds=0.02, warmup=0.1, rounds=3, precision=1.0)


class Side:
    """What is measured at the moment."""

    def __init__(self, device: str, threads: int, package: str) -> None:
        torch.set_num_threads(threads)
        self.device, self.threads = torch.device(device), threads
        self.specs, self.clock = load_specs(package), clock_for(self.device)
        self.contender: Contender | None = None
        self.judge: Judge | None = None
        self.one: known.Implementation | None = None
        self.direction = ""
        self.earlier: list[Any] = []  # places that the data lay in before
        # Of several threads the others may compute while this one waits.
        self.waiting = _waiting() if threads == 1 else float

    def hello(self) -> dict[str, Any]:
        """Which machine this is, and the files of all that was imported from outside of this Python."""
        files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
        own = sorted(file for file in files if file and not file.startswith((sys.prefix, sys.base_prefix)))
        return {"files": own, "fingerprint": fingerprint(self.device.type, self.threads)}

    def prepare(self, target: list[str], check: bool) -> dict[str, Any]:
        """Makes inputs and a warmed-up call; `seconds` of one call where the row is ok."""
        op, case, dtype, direction, impl = target
        self.contender = self.judge = self.one = None
        self.earlier.clear()
        gc.collect()
        row = Row(op, impl, case, dtype, direction, self.device.type)
        try:
            spec = self.specs[op]
            found = spec.case(case)
        except (KeyError, ValueError):
            return {"row": row.failed("unavailable", "this revision has no such case").to_json()}
        try:
            judge = Judge(spec, found, getattr(torch, dtype), self.device)
        except Exception as error:  # whatever a spec raises; `check.why_unmade` is not in every revision
            why = f"its inputs cannot be made: {type(error).__name__}: {error}"
            return {"row": row.failed("error", why.partition("\n")[0]).to_json()}
        row, contender = self._contender(judge, impl, direction, check)
        if contender is None:
            return {"row": row.to_json()}
        costs = costs_of(spec, found, judge.dtype, direction)
        work = {"flops": sum(c.flops for c in costs), "bytes": sum(c.bytes for c in costs)}
        samples = measure([contender], self.clock, _WARM_UP)[impl]
        if not samples:
            return {"row": row.failed("error", "it raised while it was timed").to_json()}
        self.contender, seconds = contender, min(samples)
        self.judge, self.direction = judge, direction
        return {"row": row.to_json() | {"threads": self.threads}, "seconds": seconds, "work": work}

    def _contender(
        self, judge: Judge, name: str, direction: str, check: bool
    ) -> tuple[Row, Contender | None]:
        """The implementation by its name, checked where asked; None where it cannot be timed."""
        args = judge.inputs.args
        places = (judge.spec, judge.case, judge.dtype, self.device)
        choice = [one for one in known.implementations(*places, args, {name}) if one.name == name]
        one = choice[0] if choice else known.of_backend(*places, name)
        row, self.one = judge.row(name, direction), one
        if one.absent:
            return row.failed("unavailable", one.absent), None
        if direction != "forward" and not judge.differentiable:
            return row.failed("unavailable", "nothing is differentiated"), None
        if not check:
            with one.context():
                return row, Contender(name, call_of(one, judge, direction), one.context)
        bench = Bench(self.device, self.clock, Roofs(), self.threads, directions=[direction])
        candidate = bench.candidate(judge, one)
        call = candidate.calls.get(direction)
        return candidate.rows[direction], call and Contender(name, call, one.context)

    def move(self, gap: int) -> dict[str, float]:
        """Lays what the call reads elsewhere in memory, and so what it writes: other addresses, and behind
        them other pages, on which a cache that is indexed by the machine's addresses depends.

        On the CPU; and so much data as lies in all kinds of places stays where it is.
        """
        judge, held = self.judge, {"inputs": self.judge.inputs}
        if "upstream" in vars(judge):
            held["upstream"] = judge.upstream
        size = sum(t.untyped_storage().nbytes() for t in judge.inputs.tensors())
        if self.device.type != "cpu" or size > _MOVED:
            return {}
        _give_back()
        self.earlier.append((held, torch.ones(gap, dtype=torch.uint8)))  # held, or their place would be taken
        vars(judge).update(copy.deepcopy(held))
        with self.one.context():
            self.contender.call = call_of(self.one, judge, self.direction)
        self.contender.batch = 1
        return {"seconds": self.clock.sample(self.contender)}

    def sample(self, batch: int) -> dict[str, float]:
        """Seconds of one call; of a batch, some calls before bring back to the caches what the other side
        drove out, which a call long enough to be a batch does by itself.

        What the scheduler gave of it to others does not count. Whoever they were, the caches are theirs then,
        so that such a sample is taken again, twice at most: longer calls are interrupted every time on a busy
        machine.
        """
        if batch > 1:
            self.contender.batch = max(1, batch // 8)
            self.clock.sample(self.contender)
        self.contender.batch = batch
        for _ in range(_TRIES):
            before, waited, own = _displaced(), self.waiting(), time.thread_time()
            seconds = self.clock.sample(self.contender)
            own, waited = time.thread_time() - own, self.waiting() - waited
            if waited:  # some of it may lie between the clock and these readings, but processor time does not
                seconds = min(seconds, max(seconds - waited / batch, own / batch))
            if _displaced() == before:
                break
        return {"seconds": seconds}


def _displaced() -> int:
    """How often the scheduler took a core from this process so far; 0 where that is not told."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def _give_back() -> None:
    """Returns free memory to the system, so that what is allocated next lies on other pages; glibc alone."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _waiting() -> Callable[[], float]:
    """Tells the seconds that this thread was ready to run and had no core so far; 0 but on Linux."""
    try:
        file = open("/proc/thread-self/schedstat", "rb", buffering=0)  # noqa: SIM115  as long as the process
    except OSError:
        return lambda: 0.0

    def seconds() -> float:
        file.seek(0)
        return int(file.read().split()[1]) / 1e9  # man proc_pid_schedstat

    return seconds


def main() -> None:
    """Answers until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes elsewhere
    side = Side(**json.loads(sys.stdin.readline()))
    gc.collect()
    gc.freeze()  # torch's hundred thousand objects are not looked through again at every target
    gc.disable()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        print(json.dumps(getattr(side, request.pop("do"))(**request)), file=answers)


if __name__ == "__main__":
    main()
