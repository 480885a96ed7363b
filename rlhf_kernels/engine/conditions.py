"""The conditions that a time is taken under, and the process that holds them.

OpenMP and the allocator read their environment when a process starts, so what is timed runs in a process of
its own. `python -m rlhf_kernels.engine.worker` reads a request on its standard input and answers with one
JSON line an event.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_kernels.runtime.files import ROOT

# Threads that spin, wander between cores or give memory back cost more than what is measured.
_FIXED = {
    "OMP_PROC_BIND": "true",
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    # Compiles in the process itself: idle compile workers would be there while the clock runs.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


class WorkerError(RuntimeError):
    """The measuring process died; the text ends with its last words."""


def conditions(threads: int) -> dict[str, str]:
    """Environment variables of a process that measures on this many threads."""
    return _FIXED | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def unmet(threads: int) -> list[str]:
    """Which conditions do not hold in this process, as `NAME=value` to set before it starts."""
    return [f"{name}={value}" for name, value in conditions(threads).items() if os.environ.get(name) != value]


def running() -> float:
    """How many processes ran at once in the last minute, on average; 0 where that is not known."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def work(request: Mapping[str, Any], threads: int) -> Iterator[dict[str, Any]]:
    """Runs a request in a process of its own and yields its events as they come.

    Raises:
        WorkerError: the process failed.
    """
    environment = os.environ | conditions(threads)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "rlhf_kernels.engine.worker"]
    with tempfile.TemporaryFile("w+") as words:
        worker = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True
        )
        try:
            worker.stdin.write(json.dumps(request))
            worker.stdin.close()
            for line in worker.stdout:
                yield json.loads(line)
            if code := worker.wait():
                words.seek(0)
                last = words.read().strip().splitlines()[-3:]
                raise WorkerError(f"the measuring process ended with {code}: {' '.join(last)}")
        finally:
            if worker.poll() is None:
                worker.terminate()
                worker.wait()
