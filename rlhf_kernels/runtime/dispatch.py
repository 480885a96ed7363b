"""Which backend runs an op, and why.

An op names its backends in order of preference per device type. The first that is installed, supports the
dtype and class of shapes, and is not overridden, is chosen once and remembered; one that the tuned table says
was measured to be faster goes before the others. Falling back from a better one warns once, with the reason
and the remedy; RLHF_KERNELS_STRICT=1 makes it an error.

`with backend("torch"):` or RLHF_KERNELS_BACKEND=torch override the choice, for one op with "gae=native".
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

import torch

from rlhf_kernels.runtime import checks, native, tuned

BACKENDS = ("reference", "torch", "native", "triton", "gluon")


class FallbackWarning(UserWarning):
    """A slower backend runs than the one this op prefers here."""


class BackendError(RuntimeError):
    """The wanted backend cannot run and strict mode forbids another."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one op, device type, dtype and class of shapes."""

    op: str
    device: str
    dtype: torch.dtype
    backend: str
    reason: str
    kernel: Any  # the module, or a runtime.tuned.Kernel over it; None in what was pickled

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op} on {self.device} in {dtype}: {self.backend} ({self.reason})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Choice, (self.op, self.device, self.dtype, self.backend, self.reason, None)


def _parse(text: str) -> tuple[tuple[str, str], ...]:
    """'torch' or 'gae=native,attention=torch' as pairs (op or '*', backend)."""
    pairs = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        op, _, name = item.rpartition("=")
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
        op = RUN_BY.get(op, op)
        if op and op not in OPS and OPS:
            raise ValueError(f"unknown op {op!r} in {text!r}: expected one of {_known()}")
        pairs.append((op or "*", name))
    return tuple(pairs)


class Override(NamedTuple):
    """What holds inside a `with` block; part of the key under which choices are remembered."""

    backends: tuple[tuple[str, str], ...] = ()
    strict: bool = False
    trials: tuple[tuned.Trial, ...] = ()


OPS: dict[str, Op] = {}
# Functions without kernels of their own -> the op whose kernels run.
RUN_BY: dict[str, str] = {}
_override: ContextVar[Override | None] = ContextVar("rlhf_kernels_backend", default=None)
# Whether any `with` block is entered in any thread: compiled graphs are made for one answer or the other.
overridden = False
_entered = 0
_entering = Lock()
_warned: set[str] = set()


def _known() -> str:
    return ", ".join(sorted({*OPS, *RUN_BY}))


@cache
def _environment() -> tuple[tuple[str, str], ...]:
    try:
        return _parse(os.environ.get("RLHF_KERNELS_BACKEND", ""))
    except ValueError as error:
        raise ValueError(f"RLHF_KERNELS_BACKEND: {error}") from None


def strict() -> bool:
    """Whether a fall-back is an error: RLHF_KERNELS_STRICT=1, or `backend(..., strict=True)`."""
    held = _override.get()
    return (held is not None and held.strict) or os.environ.get("RLHF_KERNELS_STRICT", "") not in ("", "0")


@contextmanager
def _overriding(override: Override) -> Iterator[None]:
    token = _override.set(override)
    _count(1)
    try:
        yield
    finally:
        _count(-1)
        _override.reset(token)


def _count(change: int) -> None:
    global overridden, _entered
    with _entering:
        _entered += change
        overridden = _entered > 0


@contextmanager
def backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Runs ops on one backend inside a `with` block: `backend("torch")`, `backend("gae=native")`.

    Args:
        name: a backend for all ops, or comma-separated `op=backend` pairs.
        strict: raises BackendError where a backend cannot run, instead of falling back with a warning.

    Raises:
        ValueError: no such backend or op.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend(): expected a name such as 'torch', got {type(name).__name__}")
    with _overriding((_override.get() or Override())._replace(backends=_parse(name), strict=strict)):
        yield


@contextmanager
def trial(*trials: tuned.Trial) -> Iterator[None]:
    """Runs kernels with these values of their knobs inside a `with` block, whatever the tuned table says."""
    with _overriding((_override.get() or Override())._replace(trials=trials)):
        yield


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1): for checking, never for timing."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


@cache
def unavailable(name: str, device: str) -> str | None:
    """Why backend `name` cannot run on this device type, or None."""
    if name in ("torch", "reference"):
        return None
    if name == "native":
        if device not in ("cpu", "cuda"):
            return f"there are no native kernels for {device}"
        return native.missing("_C" if device == "cpu" else "_C_cuda")
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'rlhf-kernels[triton]'"
    if device == "cpu" and not (name == "triton" and interpreted()):
        return f"{name} kernels need a GPU (TRITON_INTERPRET=1 interprets triton kernels, for checking only)"
    return None


class Op:
    """An op's backends: modules `kernel_<backend>.py` (and `reference.py`) of its room, loaded when chosen.

    A kernel module has `forward` and, where autograd cannot go through it, `backward`. It may define
    `unsupported(device, dtype, shape_class) -> str | None`, the reason why it cannot serve. DIFFERENTIABLE
    says that autograd goes through its forward, TRACEABLE that compiled graphs may hold what it is made of.

    Args:
        name: the public function's name.
        room: the package of the room, `__name__` of its `__init__.py`.
        order: device type -> backends, best first; other device types get ("torch",).
        modules: backend -> module, where a room of several ops names its files otherwise.
        sized_by: which argument of `forward` has the shape that a tuned table goes by.
    """

    def __init__(
        self,
        name: str,
        room: str,
        order: dict[str, tuple[str, ...]],
        modules: dict[str, str] | None = None,
        sized_by: int = 0,
    ) -> None:
        self.name = name
        self.room = room
        self.order = order
        self.modules = modules or {}
        self.sized_by = sized_by
        self._chosen: dict[Hashable, Any] = {}
        OPS[name] = self

    def backends(self, device: str) -> tuple[str, ...]:
        """Backends declared for a device type, best first, the definition last."""
        return (*self.order.get(device, ("torch",)), "reference")

    def declared(self) -> tuple[str, ...]:
        """Every backend of this op, on any device."""
        found = {name for order in self.order.values() for name in order} | {"torch", "reference"}
        return tuple(name for name in BACKENDS if name in found)

    def module(self, name: str) -> ModuleType:
        """The module that implements backend `name`."""
        default = "reference" if name == "reference" else f"kernel_{name}"
        return importlib.import_module(f"{self.room}.{self.modules.get(name, default)}")

    def unsupported(
        self, name: str, device: str, dtype: torch.dtype, shape_class: Hashable = None
    ) -> str | None:
        """Why backend `name` cannot serve these inputs, or None."""
        if name not in self.declared():
            return f"{self.name} has no {name} kernel"
        if name == "native" and name not in self.order.get(device, ()):  # Triton's run anywhere, interpreted
            return f"{self.name} has no native kernel for {device}"
        if reason := unavailable(name, device):
            return reason
        try:
            check = getattr(self.module(name), "unsupported", None)
        except native.OutdatedError as error:
            return str(error)
        return check(device, dtype, shape_class) if check else None

    def choose(self, tensor: torch.Tensor, shape_class: Hashable = None) -> Any:
        """The kernel for inputs like `tensor`; a dictionary look-up after the first time."""
        # True stands for the CPU: hashing a device costs as much as the rest of the key.
        key = (tensor.dtype, tensor.is_cpu or tensor.device, shape_class, _override.get())
        kernel = self._chosen.get(key)
        if kernel is None:
            kernel = self._chosen[key] = self.decide(tensor.device.type, tensor.dtype, shape_class).kernel
        return kernel

    def decide(self, device: str, dtype: torch.dtype, shape_class: Hashable = None) -> Choice:
        """Goes through the preferences; warns, or raises in strict mode, when the first cannot run."""
        held = _override.get() or Override()
        wanted = dict(_environment()) | dict(held.backends)
        asked = wanted.get(self.name, wanted.get("*"))
        preferred, declared = [asked] if asked else [], self.order.get(device, ("torch",))
        measured = [
            name
            for name in tuned.faster(self.name, declared, device, dtype, shape_class)
            if self.unsupported(name, device, dtype, shape_class) is None
        ]
        order = list(dict.fromkeys((*preferred, *measured, *declared)))
        refused: list[str] = []
        for name in order:
            reason = self.unsupported(name, device, dtype, shape_class)
            if reason is None:
                why = "measured to be faster here" if name in measured else "first choice here"
                why = "asked for" if name == asked else why
                if refused:
                    why = "; ".join(refused)
                    self._fell_back(name, device, why)
                module = self.module(name)
                kernel, note = tuned.bind(self.name, name, module, device, held.trials, self.sized_by)
                return Choice(self.name, device, dtype, name, f"{why}; {note}" if note else why, kernel)
            refused.append(f"{name}: {reason}")
        raise BackendError(f"{self.name} on {device} in {dtype}: no backend can run ({'; '.join(refused)})")

    def _fell_back(self, name: str, device: str, why: str) -> None:
        message = f"{self.name} on {device} runs on the {name} backend, because {why}"
        if strict():
            raise BackendError(f"{message}. Strict mode forbids that: mend the reason, or leave strict mode.")
        if message not in _warned:
            _warned.add(message)
            warnings.warn(
                f"{message}. RLHF_KERNELS_STRICT=1 makes this an error.", FallbackWarning, stacklevel=5
            )


def explain(op: str, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Choice:
    """Which backend would run `op` here, and why; printing the result gives one line.

    What this process has called already stays as it was chosen then, also after `torch.set_num_threads`: the
    answer is that of a new process with as many threads.

    Raises:
        ValueError: no such op.
        TypeError: no op takes this dtype.
    """
    by = RUN_BY.get(op, op)
    if by not in OPS:
        raise ValueError(f"unknown op {op!r}: expected one of {_known()}")
    if dtype not in checks.FLOATING:
        got = str(dtype).removeprefix("torch.")
        raise TypeError(f"explain(): dtype must be float32, bfloat16, float16 or float64, got {got}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        choice = OPS[by].decide(torch.device(device).type, dtype)
    notes = [choice.reason] if by == op else [choice.reason, f"by the kernels of {by}"]
    if choice.device == "cuda" and not torch.cuda.is_available():
        notes.append("PyTorch sees no GPU here")
    return replace(choice, op=op, reason="; ".join(notes))
