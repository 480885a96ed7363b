"""Attributes and items that are rebound: where a stack holds a function, and how it is put back."""

from __future__ import annotations

import functools
import inspect
import sys
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from rlhf_kernels.runtime import dispatch

ABSENT = object()


class Slot(NamedTuple):
    """An attribute of a module or class, or an item of a dictionary, and what it was."""

    label: str
    holder: Any
    key: Any
    before: Any
    ours: Any

    def put(self, value: Any) -> None:
        """Makes it that value."""
        if isinstance(self.holder, dict):
            self.holder[self.key] = value
        else:
            setattr(self.holder, self.key, value)

    def now(self) -> Any:
        """What it is; ABSENT where it is not there."""
        return attributes(self.holder).get(self.key, ABSENT)

    def restore(self) -> str | None:
        """Puts back what was there; says so where it is no longer ours to take away."""
        if self.now() is not self.ours:
            return f"{self.label} was replaced by other code meanwhile and stays as it is"
        if self.before is not ABSENT:
            self.put(self.before)
        elif isinstance(self.holder, dict):
            del self.holder[self.key]
        else:
            delattr(self.holder, self.key)
        return None


def look_up(place: str, module: ModuleType) -> tuple[Any, str] | None:
    """The object or dictionary that holds the attribute of a place, and its name; None if it is not there."""
    *path, key = place.partition(":")[2].split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part, None)
    return (owner, key) if owner is not None and key in attributes(owner) else None


def attributes(owner: Any) -> Any:
    """The dictionary in which an object holds its attributes, or the dictionary itself."""
    return owner if isinstance(owner, dict) else vars(owner)


def held(root: str, what: Any, ours: Any) -> list[Slot]:
    """The attributes of a stack's modules that are this very object."""
    found = []
    for name, module in sys.modules.copy().items():
        if (name == root or name.startswith(f"{root}.")) and isinstance(module, ModuleType):
            for key, value in vars(module).copy().items():
                if value is what:
                    found.append(Slot(f"{name}:{key}", module, key, what, ours))
    return found


def held_in(registry: str, what: Any, ours: Any) -> list[Slot]:
    """The items of a stack's dictionary that are this very object."""
    module = sys.modules.get(registry.partition(":")[0])
    found = look_up(registry, module) if module is not None else None
    if found is None:
        return []
    table = getattr(*found)
    return [
        Slot(f"{registry}[{key!r}]", table, key, what, ours)
        for key, value in dict(table).items()
        if value is what
    ]


def over(function: Any, variables: dict[str, Any], closure: Any = None) -> Any:
    """A function's code over its own globals but for these.

    They bear no module's name: torch.compile would read that module's globals in their place.
    """
    own = {**function.__globals__, **variables}
    own.pop("__name__", None)
    made = FunctionType(function.__code__, own, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__module__ = function.__module__
    return made


def other_signature(original: Any, ours: Any) -> str | None:
    """What differs between the parameters of two functions; None for the same, and for what hides them."""
    theirs, own = _parameters(original), _parameters(ours)
    if theirs is None or theirs == own:
        return None
    words = [", ".join(name for name, _, _ in side) for side in (theirs, own or ())]
    return f"its parameters are ({words[0]}), known are ({words[1]}) or other defaults"


def _parameters(function: Any) -> list[tuple[str, Any, Any]] | None:
    """Name, kind and default of each; of an autograd.Function those of its `apply`. None: not to be known."""
    if isinstance(function, type):
        is_autograd = issubclass(function, torch.autograd.Function)
        found = _parameters(function.forward if is_autograd else function.apply)
        return found[1:] if found and is_autograd else found
    found = [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
    hidden = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return None if hidden <= {kind for _, kind, _ in found} else found


def on(backend: str, function: Any) -> Any:
    """The same, its forward on one backend."""
    if isinstance(function, type):
        return type(function.__name__, (function,), {"apply": staticmethod(on(backend, function.apply))})

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with dispatch.backend(backend):
            return function(*args, **kwargs)

    return run
