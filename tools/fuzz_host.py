"""Fuzzes every function of `_host` under the sanitizers: python tools/fuzz_host.py --seconds 60

Random sizes, values, masks, NaN and infinities go to the row kernels, at every instruction-set level of this
processor, and the results are compared with a NumPy definition in float64. Definitions and random arguments
lie with the kernels, in csrc/<family>/fuzz.py: `TRIALS`, function name -> draw -> Trial. No torch anywhere.

A failure names its trial, and `--only <function>:<trial> --seed <seed>` runs that one again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import sanitize

LEVELS = ("base", "v3", "v4")


def run_level(level: str, library: Path, environment: dict[str, str], arguments: argparse.Namespace) -> int:
    """One level in a process of its own, since a process decides once; returns its exit status."""
    script = Path(__file__).with_name("fuzzing.py")
    seconds = arguments.seconds / len(LEVELS)
    command = [sys.executable, script, library, arguments.csrc, seconds, arguments.seed, arguments.only]
    own = {"RLHF_KERNELS_ISA": level, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([str(part) for part in command], env=os.environ | environment | own).returncode


def main() -> int:
    """Command line; 0 where every level agrees with the definitions and no sanitizer speaks, else 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="for all levels together (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other trials (default: 0)")
    parser.add_argument("--only", default="", help="<function>:<trial>")
    parser.add_argument("--library", type=Path, help="this _host without sanitizers, instead of building one")
    parser.add_argument("--csrc", type=Path, default=sanitize.ROOT / "csrc", help="sources (default: csrc)")
    arguments = parser.parse_args()
    library, environment = arguments.library, {}
    if library is None:
        library = sanitize.build(arguments.csrc.resolve())
        environment = {"LD_PRELOAD": sanitize.preload(), "ASAN_OPTIONS": "detect_leaks=0"}
    codes = [run_level(level, library, environment, arguments) for level in LEVELS]
    return 2 if any(codes) else 0


if __name__ == "__main__":
    raise SystemExit(main())
