"""What an op declares about itself, once: cases, inputs, cost, tolerance, kernels to compile, knobs to tune.

Tests, `check`, `bench`, `tune`, `budget` and the README's table are loops over these. A room's spec.py holds
`SPECS`, a tuple of `OpSpec`; nothing else imports it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "backward"]
Tier = Literal["smoke", "typical", "large", "awkward"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Targets that every Triton kernel is compiled for without a driver.
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


class SpecError(ValueError):
    """A declaration that does not work; the text says why."""


@dataclass(frozen=True)
class Case:
    """One named shape with its options.

    Attributes:
        name: unique within the op; stable, since results and budgets are kept under it.
        sizes: the letters of the op's signature, such as {"B": 64, "T": 1024}.
        options: keyword arguments and flags of the input maker (mask pattern, strides).
        tier: smoke (milliseconds), typical (real models' shapes), large, awkward (edges; checked, not timed).
        dtypes: what it is checked and timed in.
        checked: for cases too large for a float64 reference: {"rows": (first, last, ...)} or heads, which the
            spec's `narrow` understands. None checks everything.
    """

    name: str
    sizes: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    tier: Tier = "typical"
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    checked: Mapping[str, tuple[int, ...]] | None = None


@dataclass
class Inputs:
    """Arguments of one call; `wrt` names the arguments that are differentiated."""

    args: dict[str, Any]
    wrt: tuple[str, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """A copy with every tensor changed, also inside tuples."""
        return Inputs({name: _map(value, change) for name, value in self.args.items()}, self.wrt)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        found: list[Tensor] = []
        self.map(lambda t: found.append(t) or t)
        return found


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        items = [_map(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


@dataclass(frozen=True)
class Cost:
    """Least work of one call: floating-point operations; bytes, inputs read and outputs written once."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class KernelBuild:
    """One Triton or Gluon kernel in one configuration that may be chosen for a target.

    Attributes:
        name: unique within the op, stable: budgets are kept under "<op>/<name>/<target>".
        kernel: the JITFunction (not a heuristics or autotuner wrapper).
        signature: argument name -> Triton type ("*bf16", "i32", "fp32"), all non-constexpr arguments.
        constants: constexpr name -> value.
        target: one of TARGETS.
        num_warps, num_stages: launch options.
        tensor_core: whether the kernel must show the target's matrix instructions.
        aligned: pointer and integer arguments divisible by 16.
        gluon: built from a Gluon source.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    target: str
    num_warps: int = 4
    num_stages: int = 2
    tensor_core: bool = False
    aligned: tuple[str, ...] = ()
    gluon: bool = False


@dataclass(frozen=True)
class HostKernel:
    """One CPU row kernel for instruction counting: `call(host_module)` runs it once on fixed arrays."""

    name: str
    call: Callable[[Any], Callable[[], Any]]


@dataclass(frozen=True)
class Knob:
    """A tunable number of one backend: a keyword argument of its kernel's functions.

    Attributes:
        name: the keyword.
        backend: whose.
        candidates: values to try, the default first.
        functions: which of the kernel's functions take it.
    """

    name: str
    backend: str
    candidates: tuple[int, ...]
    functions: tuple[str, ...] = ("forward", "backward")


@dataclass(frozen=True)
class OpSpec:
    """Everything that is true of an op.

    Attributes:
        name: the public function's name.
        family: the room.
        summary: one line for tables.
        function: the public function, called with `Inputs.args` as keywords.
        reference: the definition, called with the same keywords; runs in float64 for the check.
        torch_form: the best plain PyTorch form, same keywords: the yardstick of the error, and "eager".
        make: (case, dtype, generator, device) -> Inputs.
        cost: (case, dtype, direction) -> Cost; "backward" is the backward alone.
        cases: see Case.
        outputs: names of the outputs where there are several.
        floor: how many units in the last place of the largest reference value are granted beside twice the
            error of plain PyTorch.
        narrow: (inputs, case.checked) -> (inputs of the checked part, output -> its checked part); for cases
            with `checked`.
        kernels: () -> the Triton kernels to compile ahead of time.
        host_kernels: row kernels whose instructions are counted.
        knobs: what `tune` may turn.
        operator: the op whose kernels run, where the function puts a formula of its own around another's.
        peers_match: options under which a foreign function means the same, passed to stacks.
    """

    name: str
    family: str
    summary: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    torch_form: Callable[..., Any]
    make: Callable[[Case, torch.dtype, torch.Generator, torch.device], Inputs]
    cost: Callable[[Case, torch.dtype, Direction], Cost]
    cases: tuple[Case, ...]
    outputs: tuple[str, ...] = ()
    floor: float = 1.0
    narrow: Callable[..., Any] | None = None
    kernels: Callable[[], Iterable[KernelBuild]] = tuple
    host_kernels: tuple[HostKernel, ...] = ()
    knobs: tuple[Knob, ...] = ()
    operator: str = ""

    @property
    def op(self) -> Any:
        """The op's backends (runtime.dispatch.Op)."""
        from rlhf_kernels.runtime.dispatch import OPS

        return OPS[self.operator or self.name]

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Backward exists where the first case differentiates something."""
        return ("forward", "backward") if self.differentiable else ("forward",)

    @property
    def differentiable(self) -> bool:
        """Whether any input gets a gradient.

        Raises:
            SpecError: the inputs of the first case cannot be made.
        """
        case = self.cases[0]
        try:
            inputs = self.make(case, case.dtypes[0], torch.Generator().manual_seed(0), torch.device("cpu"))
        except Exception as error:  # whatever a foreign function raises is what is wrong with it
            said = f"{type(error).__name__}: {error}"
            raise SpecError(f"{self.name}: the inputs of {case.name} cannot be made: {said}") from error
        return bool(inputs.wrt)

    def case(self, name: str) -> Case:
        """The case of that name; ValueError names those there are."""
        for case in self.cases:
            if case.name == name:
                return case
        raise ValueError(
            f"{self.name} has no case {name!r}: expected one of {', '.join(c.name for c in self.cases)}"
        )


def as_outputs(result: Any) -> tuple[Tensor, ...]:
    """A function's result as a tuple of tensors."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


@cache
def load_specs(package: str = "rlhf_kernels.ops") -> dict[str, OpSpec]:
    """Every spec by op name.

    Args:
        package: a module with SPECS, a package whose rooms have `<room>.spec` modules with SPECS, or the
            path of a Python file with SPECS.

    Raises:
        ValueError: there is none, or two specs bear one name.
        ImportError: it cannot be imported.
    """
    root = _from_file(Path(package)) if package.endswith(".py") else importlib.import_module(package)
    modules = [root]
    if hasattr(root, "__path__") and not hasattr(root, "SPECS"):
        rooms = [f"{package}.{info.name}.spec" for info in pkgutil.iter_modules(root.__path__) if info.ispkg]
        modules = [importlib.import_module(room) for room in rooms if importlib.util.find_spec(room)]
    found: dict[str, OpSpec] = {}
    for module in modules:
        for spec in getattr(module, "SPECS", ()):
            if spec.name in found:
                raise ValueError(f"two specs are named {spec.name!r} in {package}")
            found[spec.name] = spec
    if not found:
        raise ValueError(f"{package} declares no op: expected SPECS, a tuple of OpSpec")
    return found


def _from_file(path: Path) -> ModuleType:
    """Imports a file under a name that no module bears."""
    name = f"_specs_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        del sys.modules[name]
        raise ImportError(f"there is no file {path}") from None
    except BaseException:
        del sys.modules[name]
        raise
    return module


def randn(
    shape: Iterable[int], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Normal numbers, drawn in float32 on the CPU so that every device and dtype sees the same ones."""
    return torch.randn(tuple(shape), generator=generator).to(device=device, dtype=dtype)


def row_mask(pattern: str, rows: int, steps: int, generator: torch.Generator) -> Tensor:
    """A boolean [rows, steps] mask: random; none, one or two real slots a row; every second of the rows; the
    tail or head of a row masked at random lengths; middle, which adds holes and strays to a masked tail."""
    if pattern == "random":
        return torch.rand(rows, steps, generator=generator) < 0.7
    if pattern == "rows":
        return (torch.arange(rows) % 2 == 0)[:, None].expand(rows, steps).contiguous()
    if pattern in ("none", "one", "two"):
        real = torch.arange(steps) < ("none", "one", "two").index(pattern)
        return real.expand(rows, steps).roll(steps // 3, 1)
    lengths = torch.randint(steps // 8, steps + 1, (rows, 1), generator=generator)
    tail = torch.arange(steps).expand(rows, steps) < lengths
    return {"tail": tail, "head": tail.flip(1), "middle": tail ^ (torch.arange(steps) % 7 == 3)}[pattern]


def itemsize(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=dtype).element_size()
