"""How a stack's file says which of its functions can be replaced, and by what, without importing the stack.

A `Target` is what `patch` takes by name; a `Rebinding` is one function of it. A replacement has the signature
of what it replaces and computes the same; a call that our operator cannot express goes to the stack's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FAST = frozenset({"native", "triton"})


class Call(NamedTuple):
    """One call of a replaced function, for the tests and for `patch --check`: random inputs, masks included.

    Gradients are those of floating-point tensors among `args` that require one, and of modules' parameters.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = {}
    invoke: Callable[..., Any] = lambda function, *args, **kwargs: function(*args, **kwargs)
    real: Tensor | None = None  # where the outputs are compared; None: everywhere


@dataclass(frozen=True)
class Rebinding:
    """One function of a stack, and what may stand in its place.

    Attributes:
        name: what `only` calls it; unique within a version of the target.
        op: our public function that does the work; empty where less work, or another formula, needs none.
        place: "module:attribute" or "module:Class.attribute". Modules of the stack that hold the same object
            under any name are rebound too.
        make: the stack's function -> ours, with the same signature.
        call: inputs for a check, `call(large)`: small ones, or of a size that is worth timing.
        registries: "module:dictionary" of the stack, whose values may be the function.
        versions: those that have this function; None: all that the target was checked with.
        backends: with which of ours it is faster than the stack's own; with another it is left.
        leave: device type -> why it does not pay there although the backend is fast, or None.
        chosen: False where it changes results: then `only` has to name it.
        needs: the name of one further up without which this one would give what the stack cannot take.
        source: the stack's function without an import, for checks where that needs more than there is.
        note: what differs from the stack's own, for the documentation.
    """

    name: str
    op: str
    place: str
    make: Callable[[Any], Any]
    call: Callable[[bool], Call]
    registries: tuple[str, ...] = ()
    versions: tuple[str, ...] | None = None
    backends: frozenset[str] = FAST
    leave: Callable[[str], str | None] = lambda device: None
    chosen: bool = True
    needs: str = ""
    source: Callable[[], Any] | None = None
    note: str = ""

    def fits(self, version: str, target: Target) -> bool:
        """Whether a version has this function, as far as is known; of an unchecked one it may be any."""
        return self.versions is None or version in self.versions or version not in target.checked


@dataclass(frozen=True)
class Target:
    """A stack that `patch` knows.

    Attributes:
        name: what `patch` takes.
        package: the distribution; `root` is the name that one imports.
        checked: versions whose functions were compared with ours, forward and gradients.
        rebindings: in the order in which they are made.
        untouched: parts that one might expect to be replaced, and why they are not.
    """

    name: str
    package: str
    root: str
    checked: tuple[str, ...]
    rebindings: tuple[Rebinding, ...]
    untouched: Mapping[str, str] = field(default_factory=dict)
    folders: Callable[[], tuple[Path, ...]] = tuple  # where a checked version lies apart from the others


def as_booleans(mask: Any, shape: torch.Size) -> Tensor | None:
    """A mask of zeros and ones as booleans; None for weights, other shapes and what is no tensor."""
    if not isinstance(mask, Tensor) or mask.shape != shape:
        return None
    if mask.dtype is torch.bool:
        return mask
    found = mask.bool()
    if not mask.is_floating_point() and mask.numel():  # one pass says it of whole numbers
        low, high = torch.aminmax(mask)
        return found if low >= 0 and high <= 1 else None
    return found if torch.equal(found.to(mask.dtype), mask) else None


def is_number(*values: Any) -> bool:
    """Whether these are Python numbers, or tensors that hold one."""
    return all(isinstance(v, (int, float)) or (isinstance(v, Tensor) and v.numel() == 1) for v in values)


def floats(*tensors: Any) -> bool:
    """Whether these are floating-point tensors of one shape, dtype and device."""
    first = tensors[0]
    return isinstance(first, Tensor) and all(
        isinstance(t, Tensor)
        and t.is_floating_point()
        and (t.shape, t.dtype, t.device) == (first.shape, first.dtype, first.device)
        for t in tensors
    )


def picks_tokens(logits: Any, labels: Any) -> bool:
    """Whether labels are one int64 token for each row of logits [..., V]."""
    return (
        isinstance(logits, Tensor)
        and isinstance(labels, Tensor)
        and logits.is_floating_point()
        and labels.dtype is torch.int64
        and labels.shape == logits.shape[:-1]
        and labels.device == logits.device
        and logits.dim() > 1
    )


def logits_and_labels(large: bool, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[B, T, V] random logits that require a gradient and [B, T] tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 64, 50257) if large else (3, 7, 131)
    logits = torch.randn(shape, generator=generator).mul_(2).requires_grad_()
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


def left_padded(large: bool, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards and values [B, T] and a mask with padding before, after and in the middle of a row."""
    generator = torch.Generator().manual_seed(seed)
    batch, time = (64, 1024) if large else (5, 19)
    rewards, values = torch.randn(2, batch, time, generator=generator)
    mask = torch.ones(batch, time, dtype=torch.bool)
    for row in range(batch):
        mask[row, : row % 4] = False
        mask[row, time - row % 3 :] = False
        if row % 2:
            mask[row, time // 2] = False
    return rewards, values, mask
