"""`patch`: our functions in the place of a stack's own, and back.

    with rlhf_kernels.patch("verl") as patched:
        print(patched)          # what was replaced, what was left, and why

A stack's version that was not checked is refused; where a function has moved, or its signature is another one
than the known, it is left. Names that your own code has imported before stay what they were: patch first.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from rlhf_kernels.runtime import dispatch
from rlhf_kernels.stacks import STACKS, slots
from rlhf_kernels.stacks.peer import installed_version, search_paths_active
from rlhf_kernels.stacks.rebind import Rebinding, Target
from rlhf_kernels.stacks.slots import Slot

LOCK = threading.RLock()
_active: dict[str, Patched] = {}  # place -> by whom it is replaced


class PatchError(RuntimeError):
    """A stack cannot be patched as it stands; one sentence says why and what to do."""


class Replaced(NamedTuple):
    """One function that ours stands for now."""

    name: str
    op: str
    place: str
    holders: tuple[str, ...]  # everywhere it was rebound


class Patched:
    """What `patch` has done; a context manager.

    Attributes:
        target: the name that was given to `patch`.
        version: of the stack.
        replaced: what ours stands for now.
        left: name -> why it was left as it is.
    """

    def __init__(self, target: Target, version: str, backend: str | None) -> None:
        self.target = target.name
        self.version = version
        self.replaced: list[Replaced] = []
        self.left: dict[str, str] = dict(target.untouched)
        self._root = target.root
        self.backend = backend
        self.slots: list[Any] = []  # each with a `restore`
        self._pairs: list[tuple[Any, Any]] = []  # (the stack's, ours)

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"{self.target} {self.version}: {len(self.replaced)} replaced, {len(self.left)} left"]
        lines += [f"  {one.name}: {one.op and f'by {one.op} '}({one.place})" for one in self.replaced]
        lines += [f"  {name} left: {why}" for name, why in self.left.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def undo(self) -> None:
        """Puts every attribute back to the object it was; a second call does nothing.

        Code of the stack that was imported meanwhile gets the original too. Warns where other code has
        replaced what we had put in.
        """
        with LOCK:
            for slot in reversed(self.slots):
                if complaint := slot.restore():
                    warnings.warn(f"undo(): {complaint}", stacklevel=2)
            for original, ours in self._pairs:
                for slot in slots.held(self._root, ours, original):
                    slot.put(original)
            for place in [place for place, owner in _active.items() if owner is self]:
                del _active[place]
            self.slots, self._pairs, self.replaced = [], [], []

    def replace(self, rebinding: Rebinding, module: ModuleType) -> None:
        """Under LOCK: rebinds one function wherever the stack holds it, or notes why not."""
        found = slots.look_up(rebinding.place, module)
        if found is None:
            self.left[rebinding.name] = f"this version has no {rebinding.place.replace(':', '.')}"
            return
        if any(one.place == rebinding.place for one in self.replaced):
            return  # the first whose signature is the stack's has taken it
        if rebinding.needs and all(one.name != rebinding.needs for one in self.replaced):
            self.left[rebinding.name] = f"it goes with {rebinding.needs}, which is not replaced"
            return
        owner, key = found
        stored = slots.attributes(owner)[key]
        original = stored if isinstance(owner, dict) else getattr(owner, key)
        ours = rebinding.make(original)
        if complaint := slots.other_signature(original, ours):
            self.left[rebinding.name] = complaint
            return
        if self.backend:
            ours = slots.on(self.backend, ours)
        taken = [Slot(rebinding.place, owner, key, stored, ours)]
        if isinstance(owner, ModuleType):
            elsewhere = slots.held(self._root, original, ours)
            taken += [s for s in elsewhere if not (s.holder is owner and s.key == key)]
        for registry in rebinding.registries:
            taken += slots.held_in(registry, original, ours)
        for slot in taken:
            slot.put(ours)
            self.slots.append(slot)
        if isinstance(owner, ModuleType):
            self._pairs.append((original, ours))
        holders = tuple(slot.label for slot in taken)
        self.left.pop(rebinding.name, None)
        self.replaced.append(Replaced(rebinding.name, rebinding.op, rebinding.place, holders))
        _active[rebinding.place] = self


def targets() -> dict[str, Target]:
    """The stacks that `patch` knows, by name. Imports none of them."""
    modules = [importlib.import_module(f"rlhf_kernels.stacks.{name}") for name in STACKS]
    found = [target for module in modules if (target := getattr(module, "PATCH", None))]
    return {target.name: target for target in found}


def patch(
    target: str | torch.nn.Module,
    *,
    only: Iterable[str] | None = None,
    backend: str | None = None,
    allow_untested: bool = False,
) -> Patched:
    """Replaces functions of an installed stack by ours that compute the same, faster or in less memory.

    Args:
        target: "transformers", "trl", "verl", "openrlhf" or "palm_rlhf_pytorch"; or a causal model of
            transformers, which then is patched alone. Case and hyphens are as you like.
        only: names of what to replace, as `Patched` lists them. None means all that pay on this machine and
            keep the stack's results; what is named here is replaced in any case.
        backend: runs the forward of the replacements on this backend, as `rlhf_kernels.backend` does.
        allow_untested: also a version of the stack that was not checked. Functions with another signature
            than the known one are left then.

    Returns:
        What was replaced and what was left; `.undo()`, or the end of a `with` block, puts all of it back.

    Raises:
        ValueError: no such target, function or backend.
        PatchError: the stack is not installed or cannot be imported, its version was not checked, or it is
            patched already.
    """
    single = isinstance(target, torch.nn.Module)
    declared = find("transformers" if single else target)
    wanted = select(declared, only)
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(
            f"patch(): unknown backend {backend!r}: expected one of {', '.join(dispatch.BACKENDS)}"
        )
    if single:
        from rlhf_kernels.stacks.instances import patch_model

        return patch_model(target, only, backend, allow_untested, wanted)
    version = version_of(declared, allow_untested)
    wanted = [r for r in wanted if r.fits(version, declared)]
    patched = Patched(declared, version, backend)
    # Imports come first: a thread that imports holds locks for which we must not wait under our own.
    modules = [_module(r, patched) for r in wanted]
    if not any(modules):
        why = patched.left[wanted[0].name] if wanted else f"version {version} has no such function"
        raise PatchError(f"patch({target!r}): nothing can be replaced: {why}")
    with LOCK:
        refuse_double(target, wanted)
        try:
            for rebinding, module in zip(wanted, modules):
                why = None if only is not None else left_alone(rebinding, backend)
                if why is not None:
                    patched.left.setdefault(rebinding.name, why)
                elif module is not None:
                    patched.replace(rebinding, module)
        except BaseException:
            patched.undo()
            raise
    return patched


def refuse_double(target: str, wanted: Sequence[Rebinding]) -> None:
    """PatchError where one of these is replaced already."""
    held = dict.fromkeys(r.name for r in wanted if r.place in _active)
    if held:
        raise PatchError(
            f"patch({target!r}): {', '.join(held)} {'is' if len(held) == 1 else 'are'} patched already: "
            "call undo() on the first patch, or name what is not in only="
        )


def find(name: Any) -> Target:
    """The stack of that name, in any case, hyphens or not. ValueError or TypeError where there is none."""
    if not isinstance(name, str):
        raise TypeError(f"patch(): expected the name of a stack or a model, got {type(name).__name__}")
    known = targets()
    found = known.get(name.strip().lower().replace("-", "_"))
    if found is None:
        raise ValueError(f"patch(): unknown target {name!r}: expected one of {', '.join(known)}")
    return found


def select(target: Target, only: Iterable[str] | None) -> list[Rebinding]:
    """The rebindings of these names, all where `only` is None. ValueError for an unknown name."""
    if only is None:
        return list(target.rebindings)
    names = [only] if isinstance(only, str) else list(only)
    known = dict.fromkeys(rebinding.name for rebinding in target.rebindings)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"patch(): {target.name} has no {unknown[0]!r} to replace: expected some of {', '.join(known)}"
        )
    return [rebinding for rebinding in target.rebindings if rebinding.name in names]


def left_alone(rebinding: Rebinding, backend: str | None = None) -> str | None:
    """Why this function is left on this machine unless it is asked for by name, or None."""
    if not rebinding.chosen:
        return f"it changes results; only=[{rebinding.name!r}] asks for it"
    if backend is not None:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not rebinding.op:
        return rebinding.leave(device)
    choice = dispatch.explain(rebinding.op, device=device)
    if choice.backend not in rebinding.backends:
        where = f"the {choice.backend} backend on {device}"
        return f"{rebinding.op} runs on {where}, which is no faster ({choice.reason})"
    return rebinding.leave(device)


def version_of(target: Target, allow_untested: bool) -> str:
    """The installed version. PatchError where there is none, or one that was not checked."""
    where = _folder(target.root)
    version = None if where is None else installed_version(target.package, where)
    if where is None:
        hint = "" if search_paths_active() else ", or, in a checkout, call rlhf_kernels.stacks.activate()"
        raise PatchError(
            f"patch({target.name!r}): {target.package} is not installed here. "
            f"pip install '{target.package}=={target.checked[-1]}'{hint}."
        )
    if version not in target.checked and not allow_untested:
        raise PatchError(
            f"patch({target.name!r}): {target.package} {version or 'of unknown version'} was not checked, "
            f"only {' and '.join(target.checked)}. Install one of these, or pass allow_untested=True."
        )
    return version or "of unknown version"


def _folder(root: str) -> Path | None:
    """The folder that a package is, or would be, imported from."""
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        spec = None
    places = None if spec is None else list(spec.submodule_search_locations or ())
    return Path(places[0]).parent if places else None


def _module(rebinding: Rebinding, patched: Patched) -> ModuleType | None:
    """The module of a place, imported if need be; where that fails, the reason is noted."""
    name = rebinding.place.partition(":")[0]
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a foreign import may raise
        patched.left[rebinding.name] = f"{name} cannot be imported here: {type(error).__name__}: {error}"
        return None


def replaced_places() -> set[str]:
    """The places where ours stands now."""
    with LOCK:
        return set(_active)


def active() -> Sequence[Patched]:
    """The patches that hold now."""
    with LOCK:
        return list(dict.fromkeys(_active.values()))
