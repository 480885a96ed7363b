"""Each replacement in a patched stack against the stack's own function: outputs, gradients, time, memory."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.engine.check import one_line
from rlhf_kernels.engine.clock import Contender, Limits, clock_for, measure
from rlhf_kernels.engine.memory import peak_bytes
from rlhf_kernels.stacks import patching, slots
from rlhf_kernels.stacks.patching import PatchError
from rlhf_kernels.stacks.rebind import Call, Rebinding, Target

TOLERANCE = 1e-5  # float32, relative to the largest element of each output and gradient


@dataclass
class PatchRow:
    """One function of a stack, and what was found about its replacement. What is incorrect has no time.

    `status` is ok, incorrect, left or unavailable, the last three with their reason. `chosen` says whether
    `patch` replaces it on this machine without being asked by name; what cannot be imported here is compared
    from its source, and not chosen. Times are of forward and backward, bytes the most that is held at once.
    """

    target: str
    version: str
    name: str
    op: str
    device: str
    status: str
    chosen: bool = False
    reason: str | None = None
    error: float | None = None
    tolerance: float = TOLERANCE
    before_us: float | None = None
    after_us: float | None = None
    speedup: float | None = None
    before_bytes: int | None = None
    after_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def run(function: Any, call: Call) -> list[Tensor]:
    """The outputs of a call, then the gradients of all leaves under fixed upstream gradients."""
    torch.manual_seed(0)  # generation draws
    found = call.invoke(function, *call.args, **call.kwargs)
    outputs = [t for t in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(t, Tensor)]
    taken = [o if call.real is None else o[call.real] for o in outputs]
    differentiable = [t for t in taken if t.requires_grad]
    modules = [a for a in call.args if isinstance(a, torch.nn.Module)]
    leaves = [a for a in call.args if isinstance(a, Tensor) and a.requires_grad]
    leaves += [p for module in modules for p in module.parameters() if p.requires_grad]
    if not differentiable or not leaves:
        return taken
    upstream = _upstream(tuple((t.shape, t.dtype, t.device) for t in differentiable))
    gradients = torch.autograd.grad(differentiable, leaves, upstream, allow_unused=True)
    return [t.detach() for t in taken] + [torch.zeros(()) if g is None else g for g in gradients]


@lru_cache(maxsize=4)
def _upstream(kinds: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]) -> tuple[Tensor, ...]:
    """Fixed gradients of such outputs, drawn once: drawing takes longer than some of what is timed."""
    generator = torch.Generator().manual_seed(1)
    # Not randn_like, which fills by strides: the two may lie differently in memory.
    return tuple(torch.randn(shape, dtype=t, generator=generator).to(place) for shape, t, place in kinds)


def difference(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    """The largest difference relative to a tensor's largest element; inf where NaN or shapes differ."""
    if len(theirs) != len(ours):
        return float("inf")
    worst = 0.0
    for a, b in zip(theirs, ours):
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = a.double().nan_to_num(0, 0, 0), b.double().nan_to_num(0, 0, 0)
        if a.numel():
            scale = float(a.abs().max())
            gap = float((a - b).abs().max())
            worst = max(worst, gap if scale == 0 else gap / scale)
    return worst


def unimportable(rebinding: Rebinding) -> str | None:
    """Why the stack's module cannot be imported here, or None."""
    try:
        importlib.import_module(rebinding.place.partition(":")[0])
    except Exception as error:  # whatever a foreign import may raise
        return one_line(error)
    return None


def functions(rebinding: Rebinding) -> tuple[Any, Any] | None:
    """The stack's function, from its source where it cannot be imported, and ours; None: it is not there.

    Raises:
        PatchError: it is replaced just now, so that there is nothing to compare ours with.
    """
    try:
        module = importlib.import_module(rebinding.place.partition(":")[0])
    except Exception:  # whatever a foreign import may raise
        if rebinding.source is None:
            raise
        original = rebinding.source()
    else:
        if rebinding.place in patching.replaced_places():
            raise PatchError(
                f"{rebinding.name} is patched in this process: undo() it, or unset RLHF_KERNELS_PATCH, "
                "to compare"
            )
        found = slots.look_up(rebinding.place, module)
        if found is None:
            return None
        owner, key = found
        original = owner[key] if isinstance(owner, dict) else getattr(owner, key)
    return original, rebinding.make(original)


def check(
    target: Target,
    *,
    only: Sequence[str] | None = None,
    allow_untested: bool = False,
    seconds: float | None = 1.0,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[PatchRow]:
    """A row for each function that `patch` could replace on this machine, whether it would or not.

    Args:
        target: the stack.
        only: names of its functions; None for all.
        allow_untested: also of a version that was not checked.
        seconds: for the times of one function; None compares nothing and measures nothing.
        progress: is told (done, of, what next).

    Raises:
        PatchError, ValueError: as `patch`.
    """
    version = patching.version_of(target, allow_untested)
    wanted = [one for one in patching.select(target, only) if one.fits(version, target)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for number, rebinding in enumerate(wanted):
        progress(number, len(wanted), rebinding.name)
        why = patching.left_alone(rebinding)
        row = PatchRow(target.name, version, rebinding.name, rebinding.op, device, "left" if why else "ok")
        row.reason, row.chosen = why, why is None
        _examine(row, rebinding, device, seconds)
        rows.append(row)
    progress(len(wanted), len(wanted), "")
    if only is None:
        rows += [
            PatchRow(target.name, version, name, "", device, "left", reason=why)
            for name, why in target.untouched.items()
        ]
    return rows


def summary(target: Target) -> dict[str, Any]:
    """A stack that `patch` knows: the versions that were checked, and the installed one."""
    folder = patching._folder(target.root)
    return {
        "target": target.name,
        "package": target.package,
        "checked": list(target.checked),
        "installed": None if folder is None else patching.installed_version(target.package, folder),
        "functions": list(dict.fromkeys(rebinding.name for rebinding in target.rebindings)),
    }


def _examine(row: PatchRow, rebinding: Rebinding, device: str, seconds: float | None) -> None:
    """Fills in the row; a function that is left is measured too, which shows why it is."""
    try:
        found = functions(rebinding)
    except PatchError:
        raise
    except Exception as error:  # whatever a foreign import may raise
        row.status, row.reason, row.chosen = "unavailable", f"{type(error).__name__}: {error}", False
        return
    if found is None:
        place = rebinding.place.replace(":", ".")
        row.status, row.reason, row.chosen = "unavailable", f"this version has no {place}", False
        return
    if missing := unimportable(rebinding):  # `patch` would raise: what follows is of the installed source
        row.chosen, row.reason = False, f"cannot be imported here: {missing}"
        if seconds is None:
            row.status = "unavailable"
            return
        row.reason = f"compared from the installed source; {row.reason}"
    if seconds is None or not rebinding.chosen:
        return
    theirs, ours = found
    calls = [moved(rebinding.call(large), device) for large in (False, True)]
    row.error = max(difference(run(theirs, call), run(ours, call)) for call in calls)
    if not row.error <= TOLERANCE:
        row.status, row.chosen = "incorrect", False
        row.reason = f"differs by {row.error:.1e} relative, allowed is {TOLERANCE:.0e}"
        return
    call, place = calls[1], torch.device(device)
    contenders = [Contender("before", lambda: run(theirs, call)), Contender("after", lambda: run(ours, call))]
    samples = measure(contenders, clock_for(place), Limits(seconds=seconds, precision=0.03, warmup=0.3))
    before, after = (median(samples[name]) for name in ("before", "after"))
    row.before_us, row.after_us, row.speedup = before * 1e6, after * 1e6, before / after
    row.before_bytes, row.after_bytes = (peak_bytes(one.call, place) for one in contenders)


def moved(call: Call, device: str) -> Call:
    """The call with its tensors and modules on a device."""
    if device == "cpu":
        return call
    args = []
    for arg in call.args:
        if isinstance(arg, Tensor):
            arg = arg.detach().to(device).requires_grad_(arg.requires_grad)
        elif isinstance(arg, torch.nn.Module):
            arg = arg.to(device)
        args.append(arg)
    real = None if call.real is None else call.real.to(device)
    return call._replace(args=tuple(args), real=real)
