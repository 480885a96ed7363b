"""An op of one's own, declared in one place: what `rlhf-kernels check | bench | tune | budget` need of it.

    SPECS = (own_op("scale", plain_scale, {"triton": fast_scale}, make=make, cost=cost, cases=CASES),)

in `my_package/specs.py` or any file, then `rlhf-kernels check my_package.specs` or `... check file.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.engine.spec import (
    Case,
    Cost,
    Direction,
    HostKernel,
    Inputs,
    KernelBuild,
    Knob,
    OpSpec,
    randn,
)
from rlhf_kernels.runtime.dispatch import BACKENDS, OPS, Op, unavailable

__all__ = (
    "Case", "Cost", "HostKernel", "Inputs", "KernelBuild", "Knob", "OpSpec", "own_op", "randn",
)  # fmt: skip

# Best first; a GPU kernel on the CPU is interpreted, for checking, and only where it is asked for.
_PREFERENCE = {"cuda": ("gluon", "triton", "native", "torch"), "cpu": ("native", "torch")}


class OwnOp(Op):
    """An op whose backends are functions instead of modules of a room."""

    def __init__(self, name: str, backends: Mapping[str, Callable[..., Any]]) -> None:
        self.functions = dict(backends)
        order = {
            device: tuple(one for one in preferred if one in backends)
            for device, preferred in _PREFERENCE.items()
        }
        super().__init__(name, __name__, order)

    def module(self, name: str) -> Any:
        """What the engine calls `forward` of."""
        return SimpleNamespace(forward=self.functions["torch" if name == "reference" else name])

    def unsupported(
        self, name: str, device: str, dtype: torch.dtype, shape_class: Hashable = None
    ) -> str | None:
        """Why a backend cannot serve, or None; a function called native needs nothing of ours."""
        if name not in self.declared():
            return f"{self.name} has no {name} function"
        if name == "native":
            return None if name in self.order.get(device, ()) else f"native is not for {device}"
        return unavailable(name, device)


def own_op(
    name: str,
    reference: Callable[..., Any],
    backends: Mapping[str, Callable[..., Any]],
    *,
    make: Callable[[Case, torch.dtype, torch.Generator, torch.device], Inputs],
    cost: Callable[[Case, torch.dtype, Direction], Cost],
    cases: Sequence[Case],
    summary: str = "",
    torch_form: Callable[..., Any] | None = None,
    floor: float = 1.0,
    outputs: Sequence[str] = (),
    kernels: Callable[[], Iterable[KernelBuild]] = tuple,
    host_kernels: Sequence[HostKernel] = (),
    knobs: Sequence[Knob] = (),
    narrow: Callable[..., Any] | None = None,
) -> OpSpec:
    """Declares an op of one's own.

    Args:
        name: of the op; results and budgets are kept under it.
        reference: the definition in plain PyTorch, right in float64; its signature is the op's.
        backends: triton, gluon or native (whatever runs on this device without PyTorch's operators alone) ->
            a function with the reference's positional arguments, and with knobs as keywords. A function that
            is to be differentiated brings its own autograd.
        make: inputs of a case, `Inputs(args, wrt)`; the names of args are those of the reference's signature.
        cost: FLOPs and least bytes of a case and direction.
        cases: named shapes; see engine.spec.Case.
        summary: one line for tables.
        torch_form: the fall-back and the yardstick of errors and speed; the reference where none is given.
        floor, outputs, kernels, host_kernels, knobs, narrow: see engine.spec.OpSpec.

    Returns:
        The declaration; its `function` calls the best backend there is.

    Raises:
        ValueError: a name that rlhf-kernels' own ops bear, an unknown backend, or no case.
    """
    if not name.isidentifier():
        raise ValueError(f"own_op: expected a name such as 'my_scale', got {name!r}")
    if name in OPS and not isinstance(OPS[name], OwnOp):
        raise ValueError(f"own_op: {name!r} is an op of rlhf_kernels; take another name")
    allowed = [one for one in BACKENDS if one not in ("reference", "torch")]
    for backend in backends:
        if backend not in allowed:
            raise ValueError(f"own_op {name}: unknown backend {backend!r}, expected {', '.join(allowed)}")
    if not cases:
        raise ValueError(f"own_op {name}: expected a case or more, got none")
    plain = torch_form or reference
    op = OwnOp(name, {"torch": plain, **backends})
    signature = inspect.signature(reference)
    names = tuple(signature.parameters)

    @wraps(reference)
    def function(*args: Any, **kwargs: Any) -> Any:
        if tuple(kwargs) == names:  # the engine's calls: what this costs is timed with the kernel
            args = tuple(kwargs.values())
        elif kwargs:
            args = signature.bind(*args, **kwargs).args
        first = next(value for value in args if isinstance(value, Tensor))
        return op.choose(first).forward(*args)

    return OpSpec(
        name, "own", summary or (inspect.getdoc(reference) or name).partition("\n")[0], function, reference,
        plain, make, cost, tuple(cases), tuple(outputs), floor, narrow, kernels, tuple(host_kernels),
        tuple(knobs),
    )  # fmt: skip
