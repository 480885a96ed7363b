"""Which machine, versions and build a result belongs to."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from rlhf_kernels.runtime import native
from rlhf_kernels.runtime.files import PACKAGE, ROOT
from rlhf_kernels.runtime.tuned import device_name

# What decides how fast the machine itself is; roofs are kept under it.
_MACHINE = ("device", "processor", "flags", "cores", "gpu", "driver", "torch")


def fingerprint(device: str = "cpu", threads: int = 1) -> dict[str, Any]:
    """Everything that two results must share to be compared, and what helps to explain why they differ."""
    import rlhf_kernels

    found = {
        "device": device,
        "processor": device_name("cpu"),
        "flags": _processor_flags(),
        "isa": None if native.missing("_host") else native.host().isa(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "rlhf_kernels": rlhf_kernels.__version__,
        "build": {name: build_id(name) for name in native.LIBRARIES},
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }
    return found | (_gpu() if device == "cuda" else {})


def machine_id(found: dict[str, Any]) -> str:
    """A short name of the machine in a fingerprint; one thread and two are two machines."""
    parts = [f"{name}={found.get(name)}" for name in (*_MACHINE, "threads")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def build_id(name: str) -> str | None:
    """What identifies one build of a compiled library, or None where it is not built."""
    for path in sorted(PACKAGE.glob(f"{name}.*")):
        if path.suffix in (".so", ".pyd"):
            return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return None


def _processor_flags() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(flags.encode()).hexdigest()[:12]


def _gpu() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    driver, power, clock = [*map(str.strip, _output(query).partition("\n")[0].split(",")), "", "", ""][:3]
    cuda = {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    return cuda | {"gpu": device_name("cuda"), "driver": driver, "power_limit": power, "clock_max": clock}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return _output(["git", "-C", str(ROOT), *arguments]) if (ROOT / ".git").exists() else ""


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
