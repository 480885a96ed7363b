"""CUDA kernels, compiled by plain nvcc for every target: ptxas tells registers, spills and shared memory.

The sources keep to torch's stable ABI, so its headers suffice: a CPU build of torch will do, and no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_kernels._build_flags import CUDA_STANDARD, CUDA_TARGETS, NVCC_FLAGS
from rlhf_kernels.engine.budget import machine
from rlhf_kernels.engine.budget.measured import CSRC, Measured, Recorded, digest, owner, recall, remember
from rlhf_kernels.engine.spec import OpSpec

TARGETS = tuple(target.removesuffix("a") for target in CUDA_TARGETS)

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>.*)' for '(?P<target>sm_\w+?)a?'\n"
    r"(?:.*\n)*?\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*Used (?P<registers>\d+) registers(?P<rest>.*)"
)
_INCLUDE = re.compile(r'^\s*#\s*include "([^"]+)"', re.MULTILINE)
_SHARED = re.compile(r"(\d+) bytes smem")


@cache
def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def owners(specs: Sequence[OpSpec]) -> list[tuple[str, str]]:
    """The families that have CUDA kernels, twice: they serve several ops."""
    return [(path.parent.name, path.parent.name) for path in sources(spec.family for spec in specs)]


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not CSRC.is_dir():
        return "the CUDA sources are not part of an installed package: run this in a checkout"
    if _nvcc() is None:
        return "nvcc was not found: install the CUDA toolkit (12.8 or later) or set CUDA_HOME"
    if shutil.which("c++filt") is None:
        return "c++filt was not found: install binutils (apt install binutils)"
    return None


@cache
def tool() -> str:
    """What the figures depend on besides the source: the compiler."""
    text = subprocess.run([_nvcc(), "--version"], capture_output=True, text=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', text)[1]}"


def sources(families: Iterable[str]) -> list[Path]:
    """The CUDA source of each of these families that has one."""
    return [path for family in sorted(set(families)) if (path := CSRC / family / "cuda.cu").is_file()]


def measure(
    specs: Sequence[OpSpec], targets: Sequence[str], package: str, recorded: Recorded
) -> Iterator[Measured]:
    """Every kernel of these specs' families, for those of the targets that nvcc serves.

    The kernels of a file that is among the recorded have those figures, and are not compiled: but for the
    shortest file, which is compiled for one target.
    """
    asked = [target for target in CUDA_TARGETS if target.removesuffix("a") in targets]
    files = sources(spec.family for spec in specs)
    shortest = min(files, key=lambda path: path.stat().st_size, default=None)

    def measured(source: Path) -> list[Measured]:
        name = source_digest(source)
        known = recorded.get(name, {})
        if not known:
            return measure_source(source)
        sample = measure_source(source, targets=asked[:1]) if source == shortest else []
        compiled = {one.key for one in sample}
        return sample + [_recorded(source, name, key, known[key]) for key in known if key not in compiled]

    if not asked:
        return
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(measured, files):
            yield from (one for one in found if one.target in targets or one.status == "error")


def _recorded(source: Path, name: str, key: str, figures: Mapping[str, int]) -> Measured:
    notes = {"recorded": True}
    return replace(owner(key), family=source.parent.name, figures=figures, notes=notes, source=name)


def source_digest(source: Path, include: Path = CSRC) -> str:
    """A name for all that the figures of a file depend on: what it includes of ours, flags and compilers."""
    import torch

    return digest(*_included(source, include), _flags(CUDA_TARGETS), tool(), torch.__version__)[:16]


def _included(source: Path, include: Path) -> list[Path]:
    """A file and those of ours that it includes, however deep, sorted."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        found.add(path)
        named = (include / name for name in _INCLUDE.findall(path.read_text()))
        left += [one for one in named if one.is_file() and one not in found]
    return sorted(found)


def _flags(targets: Sequence[str]) -> list[str]:
    codes = [f"-gencode=arch=compute_{target[3:]},code={target}" for target in targets]
    return [*NVCC_FLAGS, CUDA_STANDARD, *codes]


def measure_source(
    source: Path, include: Path = CSRC, targets: Sequence[str] = CUDA_TARGETS
) -> list[Measured]:
    """Every kernel of one file, for these targets; one row of status error where it does not compile."""
    import torch

    headers = Path(torch.__file__).parent / "include"
    paths = ["-I", include, "-isystem", headers, "-isystem", headers / "torch/csrc/api/include"]
    flags, family = _flags(targets), source.parent.name
    name = source_digest(source, include)
    key = digest(name, flags, Path(__file__))
    kernels = recall(key)
    if kernels is None:
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                _nvcc(),
                "-c",
                source,
                "-o",
                Path(scratch) / "kernels.o",
                "-Xptxas",
                "-v",
                *flags,
                *paths,
            ]
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        log = done.stdout + done.stderr
        kernels = [] if done.returncode else list(read_ptxas(log))
        if not kernels:
            reason = next((line for line in log.splitlines() if "error" in line), "ptxas reported no kernel")
            return [Measured(family, family, "cuda", "cuda", "all", status="error", reason=reason.strip())]
        remember(key, kernels)
    return [_judged(Measured(family, family, "cuda", source=name, **kernel)) for kernel in kernels]


def read_ptxas(log: str) -> Iterator[dict[str, Any]]:
    """Name, target, figures and notes of each kernel in what `-Xptxas -v` prints."""
    text = subprocess.run(["c++filt"], input=log, capture_output=True, text=True, check=True).stdout
    for found in _ENTRY.finditer(text):
        shared = _SHARED.search(found["rest"])
        stack, spilled = int(found["stack"]), int(found["stores"]) + int(found["loads"])
        figures = {
            "registers": int(found["registers"]),
            "shared": int(shared[1]) if shared else 0,
            "spills": max(stack, spilled),
        }
        yield {
            "name": f"cuda/{stable_name(found['name'])}",
            "target": found["target"],
            "figures": figures,
            "notes": {"stack": stack},
        }


def stable_name(demangled: str) -> str:
    """`void rk::(anonymous namespace)::f<rk::bf16, 4>(float*)` as `f<bf16,4>`."""
    name = demangled.replace("(anonymous namespace)::", "").partition("(")[0].removeprefix("void ")
    return re.sub(r"\b\w+::", "", name).replace(" ", "")


def _judged(one: Measured) -> Measured:
    return replace(one, faults=tuple(machine.faults(one.target, machine.Reading(one.figures, one.notes))))
