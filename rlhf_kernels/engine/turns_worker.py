"""The process of one side of `regress`: prepares one measurement at a time, and takes a sample when told to.

turns.py hands this source to an interpreter in the environment of either revision, so that both are asked in
the same way; specs, checks and clock are those of the revision. One JSON line a request, one an answer.
"""

from __future__ import annotations

import gc
import json
import os
import sys
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

_TRIES = 6
_WARM_UP = Limits(seconds=0.02, warmup=0.1, rounds=3, precision=1.0)


class Side:
    """What is measured at the moment."""

    def __init__(self, device: str, threads: int, package: str) -> None:
        torch.set_num_threads(threads)
        self.device, self.threads = torch.device(device), threads
        self.specs, self.clock = load_specs(package), clock_for(self.device)
        self.contender: Contender | None = None

    def hello(self) -> dict[str, Any]:
        """Which machine this is, and the files of all that was imported from outside of this Python."""
        files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
        own = sorted(file for file in files if file and not file.startswith((sys.prefix, sys.base_prefix)))
        return {"files": own, "fingerprint": fingerprint(self.device.type, self.threads)}

    def prepare(self, target: list[str], check: bool) -> dict[str, Any]:
        """Makes inputs and a warmed-up call; `seconds` of one call where the row is ok."""
        op, case, dtype, direction, impl = target
        self.contender = None
        gc.collect()
        row = Row(op, impl, case, dtype, direction, self.device.type)
        try:
            spec = self.specs[op]
            found = spec.case(case)
        except (KeyError, ValueError):
            return {"row": row.failed("unavailable", "this revision has no such case").to_json()}
        judge = Judge(spec, found, getattr(torch, dtype), self.device)
        row, contender = self._contender(judge, impl, direction, check)
        if contender is None:
            return {"row": row.to_json()}
        costs = costs_of(spec, found, judge.dtype, direction)
        work = {"flops": sum(c.flops for c in costs), "bytes": sum(c.bytes for c in costs)}
        samples = measure([contender], self.clock, _WARM_UP)[impl]
        if not samples:
            return {"row": row.failed("error", "it raised while it was timed").to_json()}
        self.contender, seconds = contender, min(samples)
        return {"row": row.to_json() | {"threads": self.threads}, "seconds": seconds, "work": work}

    def _contender(
        self, judge: Judge, name: str, direction: str, check: bool
    ) -> tuple[Row, Contender | None]:
        """The implementation by its name, checked where asked; None where it cannot be timed."""
        args = judge.inputs.args
        places = (judge.spec, judge.case, judge.dtype, self.device)
        choice = [one for one in known.implementations(*places, args, {name}) if one.name == name]
        one = choice[0] if choice else known.of_backend(*places, name)
        row = judge.row(name, direction)
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

    def sample(self, batch: int) -> dict[str, float]:
        """Seconds of one call; of a batch, some calls before bring back to the caches what the other side
        drove out, which a call long enough to be a batch does by itself.

        A sample during which the scheduler gave the core to others says how long they took, and is taken
        again; where that happens every time, as it does to long calls on a busy machine, the last one counts.
        """
        if batch > 1:
            self.contender.batch = max(1, batch // 8)
            self.clock.sample(self.contender)
        self.contender.batch = batch
        for _ in range(_TRIES):
            before = _displaced()
            seconds = self.clock.sample(self.contender)
            if _displaced() == before:
                break
        return {"seconds": seconds}


def _displaced() -> int:
    """How often the scheduler took a core from this process so far; 0 where that is not told."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def main() -> None:
    """Answers until its standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes elsewhere
    side = Side(**json.loads(sys.stdin.readline()))
    gc.disable()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        print(json.dumps(getattr(side, request.pop("do"))(**request)), file=answers)


if __name__ == "__main__":
    main()
