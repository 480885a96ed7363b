"""Tuned numbers: what `rlhf-kernels tune` found best on this machine, bound to a kernel when it is chosen.

A knob is a keyword argument, with a default, of a kernel's `forward` or `backward`; the kernel does nothing
else for it. Where the table has an entry for the op, backend, device, number of threads and versions at hand,
the kernel is wrapped and each call looks up its dtype and shape; otherwise it is left as it is and costs
nothing. A shape, that of the argument which the op names, is looked up by the powers of two of its rows and
columns: the same pair, else the nearest pair within what was measured, else the default, because a table that
was measured elsewhere may mislead.

The table is <cache>/tuned.json; RLHF_KERNELS_TUNED=0 leaves it unread.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.runtime.files import cache_directory

SCHEMA = 2
FUNCTIONS = ("forward", "backward")
# An entry for no function: whether a backend was faster than the first choice, the value of CHOSEN.
CHOICE, CHOSEN = "choice", "chosen"
_REMEMBERED = 4096

ShapeClass = tuple[int, int]
Values = Mapping[str, int]
Classes = dict[ShapeClass, Values]


class Trial(NamedTuple):
    """Values of one function's knobs that hold inside `dispatch.trial`, whatever the table says."""

    op: str
    backend: str
    function: str
    values: tuple[tuple[str, int], ...]


def shape_class(tensor: Tensor) -> ShapeClass:
    """The powers of two of rows and columns: (11, 12) for [1024 .. 2047, 2048 .. 4095]."""
    cols = tensor.shape[-1] if tensor.dim() else 1
    return (tensor.numel() // cols if cols else 0).bit_length(), cols.bit_length()


def table_path() -> Path:
    """Where `tune` writes."""
    return cache_directory() / "tuned.json"


def device_name(device: str) -> str:
    """The processor or GPU that a measurement belongs to."""
    if device != "cpu":
        return torch.get_device_module(device).get_device_name()
    return _processor().get("model name") or platform.processor() or platform.machine()


def table_device(device: str) -> str:
    """The same for an entry: clouds call processors of several kinds by one name, as "AMD EPYC"."""
    known = _processor() if device == "cpu" else {}
    words = (("family", "cpu family"), ("model", "model"))
    model = ", ".join(f"{word} {known[key]}" for word, key in words if key in known)
    return f"{device_name(device)} ({model})" if model else device_name(device)


@cache
def _processor() -> dict[str, str]:
    """What the system says of its first processor, by its names."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def versions(backend: str) -> dict[str, str]:
    """What an entry must agree with to be used."""
    from rlhf_kernels import __version__

    found = {"rlhf_kernels": __version__, "torch": torch.__version__}
    if backend in ("triton", "gluon"):  # by the module, whose distribution has other names too
        found["triton"] = import_module("triton").__version__
    return found


# What an entry has at least.
_FIELDS = {"op", "backend", "function", "device", "threads", "dtype", "class", "values", "versions"}


def read_table(path: Path) -> list[dict[str, Any]]:
    """The entries of a table; none where there is no file or it is of another schema or broken."""
    try:
        content = json.loads(path.read_text())
        entries = content["entries"] if content["schema"] == SCHEMA else []
        return entries if all(entry.keys() >= _FIELDS for entry in entries) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


@cache
def _entries() -> tuple[dict[str, Any], ...]:
    return () if os.environ.get("RLHF_KERNELS_TUNED") == "0" else tuple(read_table(table_path()))


def forget() -> None:
    """Reads the table again at the next choice of a kernel."""
    _entries.cache_clear()


def mismatch(entry: Mapping[str, Any], device: str) -> str | None:
    """Why an entry is not used here, or None."""
    here = table_device(device)
    if entry["device"] != here:
        return f"measured on {entry['device']}, this is {here}"
    if device == "cpu" and entry["threads"] != torch.get_num_threads():
        return f"measured with {entry['threads']} threads, this runs {torch.get_num_threads()}"
    current = versions(entry["backend"])
    if entry["versions"] != current:
        changed = [f"{k} {v}" for k, v in entry["versions"].items() if current.get(k) != v]
        return f"measured with {', '.join(changed)}"
    return None


def classes(op: str, backend: str, function: str, device: str) -> dict[str, Classes]:
    """What the table says of a function here: dtype -> class of shapes -> values."""
    found: dict[str, Classes] = {}
    for entry in _usable(op, backend, function, device):
        found.setdefault(entry["dtype"], {})[tuple(entry["class"])] = entry["values"]
    return found


def _usable(op: str, backend: str, function: str, device: str) -> Iterator[dict[str, Any]]:
    """The entries for a function that hold here."""
    for entry in _entries():
        named = (entry["op"], entry["backend"], entry["function"])
        if named == (op, backend, function) and not mismatch(entry, device):
            yield entry


def faster(
    op: str, backends: Sequence[str], device: str, dtype: torch.dtype, columns: object
) -> tuple[str, ...]:
    """Those of the backends that were faster than the first choice wherever they were measured in this dtype.

    `columns`: with so many, as a power of 2; None is any number. With options behind them, (64, "window"),
    all that was measured with these columns must be faster, whatever its options.
    """
    columns = columns[0] if isinstance(columns, tuple) and columns else columns
    if not isinstance(columns, int | None) or not _entries():
        return ()
    name, bits = str(dtype).removeprefix("torch."), columns and columns.bit_length()
    found = []
    for backend in backends:
        alike = [
            entry["values"][CHOSEN]
            for entry in _usable(op, backend, CHOICE, device)
            if entry["dtype"] == name and bits in (None, entry["class"][1])
        ]
        found += [backend] if alike and all(alike) else []
    return tuple(found)


def lookup(found: Classes, wanted: ShapeClass) -> tuple[Values, str]:
    """Values for a class of shapes and where they come from; no values means the default."""
    if wanted in found:
        return found[wanted], "exact"
    within = found and all(min(c[i] for c in found) <= wanted[i] <= max(c[i] for c in found) for i in (0, 1))
    if not within:
        return {}, "default"
    nearest = min(found, key=lambda c: (abs(c[0] - wanted[0]) + abs(c[1] - wanted[1]), c))
    return found[nearest], f"nearest, {nearest}"


class Tuned:
    """A kernel's function with the values of its knobs bound by the dtype and shape of one argument."""

    __slots__ = ("_bound", "_classes", "_function", "_sized_by")

    def __init__(self, function: Callable[..., Any], found: dict[str, Classes], sized_by: int) -> None:
        self._function, self._classes, self._sized_by = function, found, sized_by
        self._bound: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        sized = args[self._sized_by]
        bound = self._bound.get((sized.shape, sized.dtype))
        return (bound or self._bind(sized))(*args)

    def _bind(self, sized: Tensor) -> Callable[..., Any]:
        found = self._classes.get(str(sized.dtype).removeprefix("torch."), {})
        values, _ = lookup(found, shape_class(sized))
        if len(self._bound) >= _REMEMBERED:
            self._bound.clear()
        bound = self._bound[sized.shape, sized.dtype] = (
            partial(self._function, **values) if values else self._function
        )
        return bound


class Tried:
    """A kernel's function during a trial; `seen` is the class of the shapes that it was last called with."""

    seen: dict[tuple[str, str, str], ShapeClass] = {}  # noqa: RUF012  shared on purpose: trials are made anew

    def __init__(self, function: Callable[..., Any], trial: Trial, sized_by: int) -> None:
        self._call = partial(function, **dict(trial.values))
        self._key, self._sized_by = trial[:3], sized_by

    def __call__(self, *args: Any) -> Any:
        Tried.seen[self._key] = shape_class(args[self._sized_by])
        return self._call(*args)


class Kernel:
    """A kernel module with some functions replaced."""

    def __init__(self, module: ModuleType, replaced: Mapping[str, Callable[..., Any]]) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def bind(
    op: str, backend: str, module: ModuleType, device: str, trials: tuple[Trial, ...], sized_by: int = 0
) -> tuple[Any, str]:
    """The kernel with its tuned values, and a note for `explain`; the module itself where there are none.

    `sized_by`: the argument of `forward` whose shape counts; of `backward` it is the first.
    """
    replaced: dict[str, Callable[..., Any]] = {}
    sizes = {"forward": sized_by, "backward": 0}
    for trial in trials:
        if (trial.op, trial.backend) == (op, backend):
            name = trial.function
            replaced[name] = Tried(getattr(module, name), trial, sizes[name])
    if replaced:
        return Kernel(module, replaced), "on trial"
    count = 0
    for function in FUNCTIONS if _entries() else ():
        if found := classes(op, backend, function, device):
            replaced[function] = Tuned(getattr(module, function), found, sizes[function])
            count += sum(map(len, found.values()))
    return (Kernel(module, replaced), f"tuned for {count} shapes") if replaced else (module, "")
