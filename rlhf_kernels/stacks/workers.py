"""RLHF_KERNELS_PATCH=verl,trl: patches named in the environment, so that workers are patched where they work.

Read when `rlhf_kernels` is imported. Nothing foreign is imported for it: each function is replaced as soon as
the module that holds it has been imported, by whomever. Whatever `patch` would refuse is refused at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from rlhf_kernels.stacks import patching
from rlhf_kernels.stacks.patching import Patched, PatchError
from rlhf_kernels.stacks.rebind import Rebinding

VARIABLE, UNTESTED = "RLHF_KERNELS_PATCH", "RLHF_KERNELS_PATCH_UNTESTED"


def setup() -> None:
    """For Ray's `worker_process_setup_hook`: importing this module's package has done it all."""


def watch(names: str, *, allow_untested: bool = False) -> list[Patched]:
    """Patches these stacks (comma-separated) now or once they are imported; one `Patched` each.

    Raises:
        ValueError: no such target.
        PatchError: a stack is not installed, or its version was not checked.
    """
    found = []
    wanted = map(patching.find, filter(None, (part.strip() for part in names.split(","))))
    for target in {target.name: target for target in wanted}.values():
        version = patching.version_of(target, allow_untested)
        patched = Patched(target, version, None)
        watcher = _Watcher(patched, [r for r in target.rebindings if r.fits(version, target)])
        sys.meta_path.insert(0, watcher)
        patched.slots.append(watcher)  # undo() takes it away with the rest
        for module in list(watcher.awaited):
            if module in sys.modules and not _importing(sys.modules[module]):
                watcher.arrived(sys.modules[module])
        found.append(patched)
    return found


def from_environment(environment: Any) -> list[Patched]:
    """`watch` with what the environment names; the error says where the name came from."""
    untested = environment.get(UNTESTED, "") not in ("", "0")
    try:
        return watch(environment[VARIABLE], allow_untested=untested)
    except (ValueError, PatchError) as error:
        hint = f" ({UNTESTED}=1 allows other versions)" if "not checked" in str(error) else ""
        raise type(error)(f"{VARIABLE}: {error}{hint}") from None


def _importing(module: Any) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _Watcher(MetaPathFinder):
    """Waits for the modules of one stack, and replaces their functions when they have been executed."""

    def __init__(self, patched: Patched, rebindings: Iterable[Rebinding]) -> None:
        self.patched = patched
        self.awaited: dict[str, list[Rebinding]] = {}
        for rebinding in rebindings:
            if why := patching.left_alone(rebinding):
                patched.left.setdefault(rebinding.name, why)
            else:
                self.awaited.setdefault(rebinding.place.partition(":")[0], []).append(rebinding)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that tells us when it is done."""
        if name not in self.awaited:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def arrived(self, module: ModuleType) -> None:
        """Replaces what was awaited of this module."""
        with patching.LOCK:
            rebindings = self.awaited.pop(module.__name__, [])
            patching.refuse_double(self.patched.target, rebindings)
            for rebinding in rebindings:
                self.patched.replace(rebinding, module)

    def restore(self) -> None:
        """Stops waiting."""
        self.awaited = {}
        sys.meta_path.remove(self)


class _Loader(Loader):
    """The loader of a module, and word to the watcher after it; the module keeps its own loader."""

    def __init__(self, inner: Any, watcher: _Watcher) -> None:
        self.inner = inner
        self.watcher = watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader, then the patch."""
        module.__loader__ = module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        self.watcher.arrived(module)
