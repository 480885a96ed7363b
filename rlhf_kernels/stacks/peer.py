"""One function of a foreign stack that does what one of our operators does, declared without importing it."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ENVIRONMENT = "RLHF_KERNELS_PEERS"

# Options of ours that mean nothing unless another one is given: without a mask all mask modes are the same.
_MEANINGLESS_WITHOUT = {
    ("gae", "mask_mode"): "mask",
    ("masked_normalize", "zero_masked"): "mask",
}


class Unavailable(RuntimeError):
    """The stack is not installed, has moved the function or cannot express the call; the text says which."""


def peers_root() -> Path:
    """The environment that `make peers` makes: $RLHF_KERNELS_PEERS, or .peers at the root of the checkout."""
    return Path(os.environ.get(ENVIRONMENT) or Path(__file__).parents[2] / ".peers")


def search_paths() -> list[Path]:
    """The site-packages of the peers' environment that fit this Python; empty where there is none."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = [peers_root() / "lib" / version / "site-packages", peers_root() / "Lib" / "site-packages"]
    return [folder for folder in folders if folder.is_dir()]


def activate() -> list[Path]:
    """Makes the peers importable, after everything that already is; returns their folders."""
    folders = search_paths()
    sys.path.extend(str(folder) for folder in folders if str(folder) not in sys.path)
    return folders


def search_paths_active() -> bool:
    """Whether the peers' environment is on the path already."""
    return all(str(folder) in sys.path for folder in search_paths())


def installed_version(package: str, folder: Path | None = None) -> str | None:
    """The version of an installed package, in `folder` alone if one is given; None if not installed."""
    path = [str(folder)] if folder else [*sys.path, *map(str, search_paths())]
    for found in importlib.metadata.Distribution.discover(name=package, path=path):
        return found.version
    return None


@dataclass(frozen=True)
class Peer:
    """A foreign function with the signature of ours, and where the two mean the same.

    `semantics` are keyword arguments of our function: called with these, ours computes what the stack does.
    `options` are those that the adapter takes and honours at any value. All others have to be as in
    `semantics`, or else at our defaults.
    """

    stack: str  # the file in this folder
    op: str  # the name of our public function
    label: str  # unique within the op; what a table shows
    package: str  # the distribution whose version is meant; empty for what is no package
    origin: str  # the function that is called, as the stack names it
    adapter: Callable[[], Callable[..., Any]]  # imports the stack and returns a function with our signature
    semantics: Mapping[str, Any] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    outputs: tuple[str, ...] | None = None  # those of ours that it gives; None: all
    directions: tuple[str, ...] = ("forward", "backward")
    devices: tuple[str, ...] = ("cpu", "cuda")
    folder: Callable[[], Path | None] = lambda: None  # where it lives, if apart from the other packages
    note: str = ""

    def load(self) -> Callable[..., Any]:
        """The stack's function under our signature; raises Unavailable with the reason if it cannot be had.

        The function raises Unavailable itself where it is called with shapes that the stack does not know."""
        try:
            return self.adapter()
        except Unavailable:
            raise
        except Exception as error:  # whatever a foreign import may raise
            raise Unavailable(f"{self.origin}: {type(error).__name__}: {error}{self._hint()}") from error

    def _hint(self) -> str:
        if self.package and self.version() is None:
            return " (make peers)"
        return "" if search_paths_active() else " (call rlhf_kernels.stacks.activate() first)"

    def version(self) -> str | None:
        """The installed version of the stack, without importing it."""
        return installed_version(self.package, self.folder()) if self.package else None

    def supports(
        self, arguments: Mapping[str, Any], *, direction: str = "forward", device: str | None = None
    ) -> str | None:
        """Why this peer cannot stand beside ours for a call with these arguments; None if it can."""
        if direction not in self.directions:
            return f"{self.label} has no {direction}"
        if device is not None and device not in self.devices:
            return f"{self.label} does not run on {device}"
        for name, default in _parameters(self.op).items():
            required = default is inspect.Parameter.empty
            switch = _MEANINGLESS_WITHOUT.get((self.op, name))
            if name in self.options or (required and name not in self.semantics):
                continue
            if switch is not None and arguments.get(switch) is None:
                continue
            wanted, has = arguments.get(name, default), self.semantics.get(name, default)
            if not _same(wanted, has):
                return f"{self.label} takes no {name}" if has is None else f"{self.label} has {name}={has!r}"
        return None


def _same(wanted: Any, has: Any) -> bool:
    """Equality that a tensor among the options does not upset: a tensor is never what a stack fixes."""
    return wanted is has or (not hasattr(wanted, "shape") and wanted == has)


@cache
def _parameters(op: str) -> dict[str, Any]:
    """Our arguments and their defaults (`inspect.Parameter.empty` if required), from the function itself."""
    import rlhf_kernels

    return {p.name: p.default for p in inspect.signature(getattr(rlhf_kernels, op)).parameters.values()}
