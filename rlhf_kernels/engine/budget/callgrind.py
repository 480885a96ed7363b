"""Instructions of the CPU row kernels, counted by callgrind: a budget without noise.

The specs' host kernels are recorded here and replayed under valgrind on `_host`, without torch. Counted are
the instructions inside `_host` and the mathematical library, not Python's or NumPy's, so a count repeats to
the instruction. Valgrind knows no AVX-512: the x86-64-v3 level runs.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_kernels.engine.budget.measured import Measured, digest, recall, remember
from rlhf_kernels.engine.spec import HostKernel, OpSpec
from rlhf_kernels.runtime import native

LEVEL = "v3"
_DRIVER = Path(__file__).with_name("callgrind_driver.py")
_COUNTED_OBJECT = re.compile(r"/_host\.|/libmvec|/libm[.-]")


def owners(specs: Sequence[OpSpec]) -> list[tuple[str, str]]:
    """Family and op of the specs that have such kernels."""
    return [(spec.family, spec.name) for spec in specs if spec.host_kernels]


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    if reason := native.missing("_host"):
        return f"rlhf_kernels._host is not available: {reason}"
    if native.host().isa() == "base":
        return f"_host runs at level base here (the processor, or RLHF_KERNELS_ISA), budgets are for {LEVEL}"
    if shutil.which("valgrind") is None:
        return "valgrind was not found: install it (apt install valgrind)"
    return None


def tool() -> str:
    """What a count depends on besides the source: the compiler. Valgrind's version has no influence."""
    return f"gcc {native.host().compiler()}"


class _Recorder:
    """Stands for `_host` and writes down what is called on it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def recorded(kernel: HostKernel) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The calls of `_host` that a host kernel makes: name, arguments, keywords."""
    recorder = _Recorder()
    kernel.call(recorder)()
    return recorder.calls


def measure(
    specs: Sequence[OpSpec], targets: Sequence[str], package: str, _sources: Mapping[str, Any]
) -> Iterator[Measured]:
    """Every host kernel of these specs, if LEVEL is among the targets; all are counted."""
    kernels = [(spec, kernel, recorded(kernel)) for spec in specs for kernel in spec.host_kernels]
    if not kernels or LEVEL not in targets:
        return
    counts = count(Path(native.host().__file__), [calls for _, _, calls in kernels])
    for (spec, kernel, _), instructions in zip(kernels, counts, strict=True):
        figures = {"instructions": instructions}
        yield Measured(spec.family, spec.name, "host", f"host/{kernel.name}", LEVEL, figures)


def count(library: Path, kernels: Sequence[Sequence[Any]]) -> list[int]:
    """Instructions of each kernel's recorded calls in this `_host`; RuntimeError where valgrind fails."""
    recording = pickle.dumps(list(kernels))
    key = digest(library, recording, _DRIVER, Path(__file__))
    counts = recall(key)
    if counts is None:
        counts = _count(library, recording)
        if len(counts) != len(kernels):
            raise RuntimeError(f"callgrind gave {len(counts)} counts for {len(kernels)} kernels")
        remember(key, counts)
    return counts


def _count(library: Path, recording: bytes) -> list[int]:
    with tempfile.TemporaryDirectory() as scratch:
        calls, out = Path(scratch) / "calls.pickle", Path(scratch) / "callgrind"
        calls.write_bytes(recording)
        command = [
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={out}", "--dump-line=no",
            "--compress-strings=no", "--compress-pos=no",
            "--toggle-collect=rk_counted", "--dump-after=rk_counted",
            sys.executable, "-I", _DRIVER, library, calls,
        ]  # fmt: skip
        environment = os.environ | {
            "RLHF_KERNELS_ISA": LEVEL,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [str(part) for part in command], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"valgrind failed with exit status {done.returncode}: {last[0]}")
        parts = sorted(Path(scratch).glob("callgrind.*"), key=lambda path: int(path.suffix[1:]))
        return [own_instructions(part.read_text()) for part in parts]


def own_instructions(profile: str) -> int:
    """Instructions that a callgrind profile charges to `_host` and the mathematical library themselves."""
    total, counted, called = 0, False, False
    for line in profile.splitlines():
        if line.startswith("ob="):
            counted = _COUNTED_OBJECT.search(line) is not None
        elif line.startswith("calls="):
            called = True  # the next line is the callee's cost, charged there as well
        elif line[:1].isdigit():
            if counted and not called:
                total += int(line.split()[1])
            called = False
    return total
