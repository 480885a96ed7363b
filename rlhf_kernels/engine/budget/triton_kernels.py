"""Triton and Gluon kernels, compiled for every target without a driver, by worker processes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf_kernels.engine.budget import machine
from rlhf_kernels.engine.budget.measured import Measured, Recorded
from rlhf_kernels.engine.spec import TARGETS, OpSpec


def owners(specs: Sequence[OpSpec]) -> list[tuple[str, str]]:
    """Family and op of the specs that declare a Triton or Gluon kernel."""
    return [(spec.family, spec.name) for spec in specs if {"triton", "gluon"} & set(spec.op.declared())]


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'rlhf-kernels[triton]'"
    if machine.nvidia_tools() is None:
        return "this Triton came without nvdisasm: install the wheel, pip install 'rlhf-kernels[triton]'"
    return None


def tool() -> str:
    """What the figures depend on besides the source: the compiler."""
    return f"triton {importlib.metadata.version('triton')}"


def measure(
    specs: Sequence[OpSpec], targets: Sequence[str], package: str, recorded: Recorded
) -> Iterator[Measured]:
    """Every kernel of these specs for those of the targets that Triton serves.

    A kernel whose source is among the recorded has those figures and is not compiled.
    """
    workers = max(1, min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    request = {"package": package, "ops": [spec.name for spec in specs], "targets": list(targets)}
    request["recorded"] = {source: next(iter(budgets.values())) for source, budgets in recorded.items()}
    if not set(targets) & set(TARGETS):
        return
    with ThreadPoolExecutor(workers) as pool:
        shares = pool.map(lambda which: _share(request | {"share": [which, workers]}), range(workers))
        for found in shares:
            yield from found


def _share(request: dict[str, Any]) -> list[Measured]:
    """Runs a worker, and once more without the kernel that killed it, until its share is done."""
    found: dict[str, Measured] = {}
    while True:
        done, started = _worker(request | {"skip": list(found)})
        found |= {one.key: one for one in done}
        if started is None:
            return list(found.values())
        found[started.key] = started


def _worker(request: dict[str, Any]) -> tuple[list[Measured], Measured | None]:
    """What a worker answered, and the kernel on which it died, if it did."""
    # Kernels decorated under the interpreter cannot be compiled.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rlhf_kernels.engine.budget.worker"]
    ran = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, env=environment)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    done = [_measured(line["done"]) for line in lines if "done" in line]
    if ran.returncode == 0:
        return done, None
    last = ran.stderr.strip().splitlines()[-1:] or ["no message"]
    if not lines or "start" not in lines[-1]:
        raise RuntimeError(f"the compiling process failed outside of the compiler: {last[0]}")
    reason = f"the compiler died with exit status {ran.returncode}: {last[0]}"
    return done, _measured(lines[-1]["start"] | {"status": "error", "reason": reason})


def _measured(fields: dict[str, Any]) -> Measured:
    return Measured(**fields | {"faults": tuple(fields["faults"])})
