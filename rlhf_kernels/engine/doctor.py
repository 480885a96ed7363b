"""What works here and what does not: each backend per device, with the reason and the remedy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from rlhf_kernels.engine import conditions
from rlhf_kernels.engine.check import one_line
from rlhf_kernels.engine.fingerprint import build_id, fingerprint
from rlhf_kernels.engine.store import unwritable
from rlhf_kernels.runtime import native, tuned
from rlhf_kernels.runtime.dispatch import BACKENDS, OPS, BackendError, explain, unavailable
from rlhf_kernels.runtime.files import cache_directory
from rlhf_kernels.stacks import STACKS, peers

_PRODUCTS = {"floats": "as floats", "pairs": "in pairs (AVX512_BF16)", "tiles": "by tiles (AMX)"}
# Packages, and what to do where one is not installed.
_PACKAGES = {
    "rlhf-kernels": "runs from its sources",
    "torch": "pip install torch",
    "triton": "pip install 'rlhf-kernels[triton]'",
    "numpy": "pip install 'rlhf-kernels[triton]'; the interpreter and _host need it",
    "rich": "tables are plain; pip install 'rlhf-kernels[cli]'",
}


@dataclass
class Finding:
    """One line: `state` is ok, absent (it works without), warning or error."""

    topic: str
    name: str
    state: Literal["ok", "absent", "warning", "error"]
    detail: str


def findings() -> Iterator[Finding]:
    """Everything worth knowing, topic by topic."""
    for topic in (_machine, _backends, _ops, _tools, _tuned, _peers, _environment):
        try:
            yield from topic()
        except Exception as error:  # what is broken must not hide the rest
            yield Finding(topic.__name__.strip("_"), "doctor", "error", one_line(error))


def _finding(topic: str, name: str, found: str | None, otherwise: str) -> Finding:
    return Finding(topic, name, "ok" if found else "absent", found or otherwise)


def _machine() -> Iterator[Finding]:
    found = fingerprint()
    processor = f"{found['processor']}, {found['cores']} cores, instruction set {found['isa'] or 'unknown'}"
    if not native.missing("_host") and hasattr(native.host(), "bfloat16_products"):
        processor += f"; decoding multiplies bfloat16 {_PRODUCTS[native.host().bfloat16_products()]}"
    yield Finding("machine", "processor", "ok", processor)
    yield _finding("machine", "GPU", _gpus(), _no_gpu())
    yield Finding("machine", "python", "ok", f"{platform.python_version()} ({sys.executable})")
    for name, remedy in _PACKAGES.items():
        yield _finding("machine", name, _version(name), f"not installed: {remedy}")
    if (busy := conditions.running()) > 0.5:
        note = f"{busy:.1f} processes were running in the last minute: timings will be noisy"
        yield Finding("machine", "load", "warning", note)


def _gpus() -> str | None:
    if not torch.cuda.is_available():
        return None
    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{count} x {name}" for name, count in names.items())


def _no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "torch is a CPU build; with a GPU, install a build of torch for it (pytorch.org/get-started)"
    return "torch sees no GPU: torch.cuda.is_available() is False"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _backends() -> Iterator[Finding]:
    for device in _devices():
        for name in BACKENDS:
            reason = unavailable(name, device)
            yield _finding(f"backends on {device}", name, None if reason else "available", reason or "")
    if not torch.cuda.is_available():
        yield Finding("backends on cuda", "all", "absent", _no_gpu())


def _devices() -> list[str]:
    return ["cpu"] + ["cuda"] * torch.cuda.is_available()


def _ops() -> Iterator[Finding]:
    for op in sorted(OPS):
        for device in _devices():
            try:
                choice = explain(op, device=device)
                yield Finding("what runs", f"{op} on {device}", "ok", f"{choice.backend}: {choice.reason}")
            except BackendError as error:
                yield Finding("what runs", f"{op} on {device}", "error", str(error))


def _tools() -> Iterator[Finding]:
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    tools = {
        "C++ compiler": (compiler, "install g++: native kernels and torch.compile on CPU need it"),
        "nvcc": ("nvcc", "install the CUDA toolkit to build the CUDA C++ kernels"),
        "ninja": ("ninja", "pip install ninja"),
        "valgrind": ("valgrind", "counts instructions for `budget`; apt install valgrind"),
    }
    for name, (command, remedy) in tools.items():
        yield _finding("tools", name, _tool(command), remedy)
    for name in native.LIBRARIES:
        reason = native.missing(name)
        yield _finding("native build", name, None if reason else f"build {build_id(name)}", reason or "")


def _tool(command: str) -> str | None:
    path = shutil.which(command) or shutil.which(command, path=os.path.dirname(sys.executable))
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    numbered = (line.strip() for line in said.splitlines() if re.search(r"\d\.\d", line))
    return f"{next(numbered, '')} ({path})".strip()


def _tuned() -> Iterator[Finding]:
    path = tuned.table_path()
    entries = tuned.read_table(path)
    if not entries:
        yield Finding(
            "tuned table",
            "tuned.json",
            "absent",
            f"none that this version reads at {path}: rlhf-kernels tune makes it",
        )
        return
    reasons = Counter(tuned.mismatch(entry, _device_of(entry)) for entry in entries)
    used = reasons.pop(None, 0)
    yield Finding("tuned table", "tuned.json", "ok", f"{used} of {len(entries)} entries apply here ({path})")
    for reason, count in reasons.items():
        yield Finding("tuned table", f"{count} skipped", "absent", f"{reason}: rlhf-kernels tune")


def _device_of(entry: dict) -> str:
    return "cpu" if entry["device"] == tuned.table_device("cpu") or not torch.cuda.is_available() else "cuda"


def _peers() -> Iterator[Finding]:
    for stack in STACKS:
        found = dict.fromkeys((peer.package, peer.version()) for peer in peers(stack=stack) if peer.package)
        for package, version in found:
            yield _finding("peers for bench", package, version, "not installed: make peers")


def _environment() -> Iterator[Finding]:
    cache = cache_directory()
    if reason := unwritable(cache / "tuned.json"):
        lost = f"{cache}: {reason}; nothing is kept. Name a folder in RLHF_KERNELS_CACHE that can be written"
        yield Finding("environment", "cache", "error", lost)
    else:
        yield Finding("environment", "cache", "ok", str(cache))
    for name in sorted(n for n in os.environ if n.startswith("RLHF_KERNELS_") or n == "TRITON_INTERPRET"):
        yield Finding("environment", name, "ok", os.environ[name])
    fixed = ", ".join(f"{name}={value}" for name, value in conditions.conditions(1).items())
    yield Finding("environment", "bench runs with", "ok", fixed)
