"""Trials of the row kernels against NumPy definitions: what csrc/<family>/fuzz.py imports and what runs it.

Run by fuzz_host.py, once for each instruction-set level: fuzzing.py <library> <csrc> <seconds> <seed> [only]
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Of the module itself, not row kernels.
NOT_KERNELS = {"isa", "bfloat16_products", "compiler", "counted"}
_BIG = float(np.finfo(np.float32).max)


@dataclass
class Trial:
    """One call and what it must give.

    Attributes:
        args: of the function, positional.
        expected: results by the definition, in float64.
        slack: absolute error granted to each result besides the relative one (a number or an array).
        relative: relative error granted.
        free: where nothing is promised; None is nowhere.
        kwargs: of the function.
    """

    args: tuple[Any, ...]
    expected: tuple[np.ndarray, ...]
    slack: Any = 0.0
    relative: float = 4e-6
    free: np.ndarray | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


class Draw:
    """Random arguments; the same generator gives the same ones."""

    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def size(self, most: int = 3000) -> int:
        """Often small, often at the edge of a vector or a block, sometimes large."""
        kind = self.rng.integers(4)
        if kind == 0:
            return int(self.rng.integers(0, 5))
        if kind == 1:
            return int(self.rng.integers(0, 130))
        if kind == 2:
            near = 2 ** int(self.rng.integers(3, 12)) + int(self.rng.integers(-1, 2))
            return min(near, most)
        return int(self.rng.integers(0, most + 1))

    def choice(self, *options: Any) -> Any:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def floats(self, shape: tuple[int, ...] | int, odd: bool = True, spread: float = 1.0) -> np.ndarray:
        """float32: normal of some scale; with `odd`, sometimes huge, tiny, NaN and infinite ones too."""
        scale = spread * 10.0 ** self.rng.uniform(-2, 2)
        x = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        if odd and x.size and self.rng.random() < 0.3:
            specials = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 87.3, -87.4, 88.8]
            at = self.rng.integers(0, x.size, size=1 + x.size // 20)
            x.flat[at] = self.rng.choice(np.array(specials, np.float32), size=at.size)
        return self.laid_out(x)

    def mask(self, shape: tuple[int, ...] | int) -> np.ndarray:
        """bool: random of some density, now and then all or none."""
        density = self.choice(0.0, 1.0, 0.5, 0.9, 0.1, self.rng.random())
        return self.laid_out(self.rng.random(shape) < density)

    def laid_out(self, x: np.ndarray) -> np.ndarray:
        """The same values contiguous, off alignment, or strided."""
        kind = self.rng.integers(4)
        if kind == 0 and x.size:
            room = np.empty(x.nbytes + 1, np.uint8)[1:]
            if x.itemsize == 1:
                room[...] = x.view(np.uint8).ravel()
                return room.view(x.dtype).reshape(x.shape)
        if kind == 1 and x.ndim:
            wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
            wide[..., ::2] = x
            return wide[..., ::2]
        if kind == 2 and x.size:
            room = np.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
            room[...] = x
            return room
        return x


def disagreement(got: np.ndarray, expected: np.ndarray, trial: Trial) -> str | None:
    """Where a float32 result is not the float64 definition, in words; None where it is."""
    if got.shape != expected.shape:
        return f"shape {got.shape}, expected {expected.shape}"
    allowed = trial.relative * np.abs(expected) + trial.slack + 2e-38
    near = np.abs(got.astype(np.float64) - expected) <= allowed
    # Beyond float32 both infinity and what rounds to its largest number are right.
    over = (np.abs(expected) > 0.999 * _BIG) & (np.abs(got) > 0.998 * _BIG)
    over &= np.sign(expected) == np.sign(got)
    undefined = np.isnan(got) & np.isnan(expected)
    wrong = ~(near | over | undefined)
    if trial.free is not None:
        wrong &= ~trial.free
    if not wrong.any():
        return None
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{int(wrong.sum())} of {wrong.size} wrong, first at {at}: {got[at]!r}, expected {expected[at]!r}"


def load_host(path: str) -> Any:
    """The `_host` module at this path."""
    loader = importlib.machinery.ExtensionFileLoader("_host", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_host", loader))
    loader.exec_module(module)
    return module


def load_trials(csrc: Path) -> dict[str, Callable[[Draw], Trial]]:
    """The trials of every family."""
    found: dict[str, Callable[[Draw], Trial]] = {}
    for path in sorted(csrc.glob("*/fuzz.py")):
        spec = importlib.util.spec_from_file_location(f"fuzz_{path.parent.name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= module.TRIALS
    return found


def attempt(host: Any, name: str, make: Callable[[Draw], Trial], seed: int, number: int) -> str | None:
    """Runs one trial; a disagreement, or a changed input, in words."""
    trial = make(Draw(seed, sum(name.encode()), number))
    arrays = [a for a in trial.args if isinstance(a, np.ndarray)]
    before = [a.tobytes() for a in arrays]
    got = getattr(host, name)(*trial.args, **trial.kwargs)
    if [a.tobytes() for a in arrays] != before:
        return "an input was changed"
    results = got if isinstance(got, tuple) else (got,)
    if len(results) != len(trial.expected):
        return f"{len(results)} results, expected {len(trial.expected)}"
    for result, expected in zip(results, trial.expected):
        if found := disagreement(result, expected, trial):
            return found
    return None


def fuzz(library: str, csrc: Path, seconds: float, seed: int, only: str = "") -> int:
    """Trials of all functions in turn for so long; returns how many failed or have no definition."""
    host, trials = load_host(library), load_trials(csrc)
    names = {name for name in dir(host) if not name.startswith("_")} - NOT_KERNELS
    failures = dict.fromkeys(names - set(trials), "no trial: add it to TRIALS in csrc/<family>/fuzz.py")
    end, number = time.monotonic() + seconds, 0
    pending = sorted(names & set(trials))
    if only:
        name, _, number = only.partition(":")
        pending, number, end = [name], int(number), 0.0
    while pending:
        for name in list(pending):
            found = attempt(host, name, trials[name], seed, number)
            if found:
                failures[name] = f"{found} (again: --only {name}:{number} --seed {seed})"
                pending.remove(name)
        number += 1
        if time.monotonic() > end:
            break
    for name, found in sorted(failures.items()):
        print(f"{host.isa()} {name}: {found}")
    print(f"{host.isa()}: {number} trials of {', '.join(sorted(names))}: {len(failures)} failed")
    return len(failures)


if __name__ == "__main__":
    _library, _csrc, _seconds, _seed, *_only = sys.argv[1:]
    sys.modules["fuzzing"] = sys.modules["__main__"]  # the families import the same classes
    np.seterr(all="ignore")  # NaN and infinities are wanted
    raise SystemExit(2 if fuzz(_library, Path(_csrc), float(_seconds), int(_seed), *_only) else 0)
