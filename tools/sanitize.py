"""Builds `_host` under the address and undefined-behaviour sanitizers and prints where: tools/sanitize.py

Objects are kept in .cache/sanitized, each under a digest of what it depends on: the headers that it names,
the flags and the compiler. Leaks are not looked for: Python's own would drown them.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import runpy
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "sanitized"
# Of the undefined-behaviour checks those that a crash would not show; all of them double the time to compile.
_SANITIZE = [
    "-fsanitize=address,alignment,bool,bounds,enum,integer-divide-by-zero,shift,signed-integer-overflow",
    "-fno-sanitize-recover=all",
]


def flags() -> list[str]:
    """The flags of the real build, with line numbers and checks, hardly optimised."""
    import pybind11

    given = runpy.run_path(str(ROOT / "rlhf_kernels" / "_build_flags.py"))
    real = given["CXX_FLAGS"] + given["level_flags"](here=True)
    kept = [flag for flag in real if not flag.startswith(("-O", "-g"))]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    return ["-std=c++17", "-Og", "-g1", "-fPIC", "-fno-omit-frame-pointer", *kept, *_SANITIZE, *includes]


def build(csrc: Path = ROOT / "csrc", families: tuple[str, ...] = ()) -> Path:
    """Compiles what changed and links `_host`; families () means all. Raises CalledProcessError."""
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = [csrc / "host.cpp"]
    sources += [p for p in sorted(csrc.glob("*/*host.cpp")) if not families or p.parent.name in families]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, csrc), sources))
    name = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    library = CACHE / name / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        _run([compiler(), "-shared", *_SANITIZE, *map(str, objects)], library)
    return library


def compiler() -> str:
    """The C++ compiler that the real build takes."""
    return os.environ.get("CXX", "g++")


def preload() -> str:
    """The sanitizer's library, which must be loaded before Python."""
    command = [compiler(), "-print-file-name=libasan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _compile(source: Path, csrc: Path) -> Path:
    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    content = [path.read_bytes() for path in sorted(_named(source, csrc, set()))]
    parts = [version, repr(flags()).encode(), *content]
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    target = CACHE / f"{name}.o"
    if not target.exists():
        _run([compiler(), *flags(), f"-I{csrc}", "-c", str(source)], target)
    return target


def _named(source: Path, csrc: Path, found: set[Path]) -> set[Path]:
    """The file and all of csrc's headers that it names, as an include or for RK_ROWS."""
    found.add(source)
    for name in re.findall(r'^ *#.*"([\w/]+\.h)"', source.read_text(), re.MULTILINE):
        if (csrc / name).exists() and csrc / name not in found:
            _named(csrc / name, csrc, found)
    return found


def _run(command: list[str], target: Path) -> None:
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    subprocess.run([*command, "-o", str(aside)], check=True)
    aside.replace(target)


def main() -> None:
    """Command line: an optional csrc directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csrc", nargs="?", type=Path, default=ROOT / "csrc", help="sources (default: csrc)")
    print(build(parser.parse_args().csrc.resolve()))


if __name__ == "__main__":
    main()
