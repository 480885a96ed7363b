"""The process that measures: reads one request as JSON on standard input, writes one JSON line an event.

Started by `conditions.work`, which sets its environment. Whatever else is printed here, by a foreign stack
for instance, goes to standard error.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from rlhf_kernels import stacks
from rlhf_kernels.engine.bench import Bench
from rlhf_kernels.engine.clock import Limits, clock_for
from rlhf_kernels.engine.roofs import roofs_for
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.engine.tune import Tuner, tunable

Emit = Callable[..., None]


def bench(request: dict[str, Any], emit: Emit) -> None:
    """Times the requested measurements: [op, case, dtype] each."""
    device, threads = torch.device(request["device"]), request["threads"]
    specs = load_specs(request["package"])
    stacks.activate()
    dtypes = {dtype for _, _, dtype in request["measurements"]}
    roofs = roofs_for(device, threads, [getattr(torch, name) for name in sorted(dtypes)])
    emit("roofs", **dataclasses.asdict(roofs))
    bench = Bench(
        device, clock_for(device), roofs, threads, Limits(**request["limits"]),
        request["wanted"], request["baseline"], request["directions"],
    )  # fmt: skip
    for op, case, dtype in request["measurements"]:
        emit("start", op=op, case=case, dtype=dtype)
        spec = specs[op]
        _freeze()
        for row in bench.rows(spec, spec.case(case), getattr(torch, dtype)):
            emit("row", row=row.to_json())


def tune(request: dict[str, Any], emit: Emit) -> None:
    """Tunes the requested [op, case, dtype], each with every backend that is named."""
    device, specs = torch.device(request["device"]), load_specs(request["package"])
    for op, case, dtype in request["measurements"]:
        spec = specs[op]
        for backend in request["wanted"]:
            if backend not in tunable(spec, device.type):
                continue
            emit("start", op=op, case=case, dtype=dtype, backend=backend)
            _freeze()
            tuner = Tuner(
                spec, spec.case(case), getattr(torch, dtype), backend, device, clock_for(device),
                Limits(**request["limits"]),
            )  # fmt: skip
            for outcome in tuner.outcomes():
                emit("outcome", outcome=dataclasses.asdict(outcome))


def _freeze() -> None:
    """Collects garbage, and has no later collection look through what is left: modules of torch and of other
    stacks, which take 0.2 s before every measurement."""
    gc.collect()
    gc.freeze()


COMMANDS = {"bench": bench, "tune": tune}


def main() -> None:
    """Serves one request."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def emit(event: str, **content: Any) -> None:
        print(json.dumps({"event": event, **content}), file=answers, flush=True)

    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    COMMANDS[request["command"]](request, emit)


if __name__ == "__main__":
    main()
