"""Whatever computes an op at a case: plain PyTorch, `torch.compile` of it, our backends, foreign stacks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from rlhf_kernels.engine.check import refusal
from rlhf_kernels.engine.spec import Case, OpSpec
from rlhf_kernels.runtime.dispatch import backend as use_backend
from rlhf_kernels.stacks import Peer, Unavailable, peers

EAGER = "torch"
COMPILED = "torch.compile"
# A loop over time steps is unrolled into a graph that takes minutes to compile.
COMPILE_SECONDS = 60


@dataclass
class Implementation:
    """One way to compute an op.

    Attributes:
        name: a backend, "torch.compile", or the label of a peer.
        function: called with the arguments of the public function; raises Unavailable where it cannot serve.
        context: holds while it is called.
        limit: holds while it is called for the first time.
        foreign: whether it is another stack's, and checked as such.
        version: of a foreign package.
        directions: what it can be asked for.
        outputs: indices of the op's outputs where it gives only some.
        absent: why it cannot be called at all, or None.
    """

    name: str
    function: Callable[..., Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    limit: Callable[[], AbstractContextManager[Any]] = nullcontext
    foreign: bool = False
    version: str | None = None
    directions: tuple[str, ...] = ("forward", "backward")
    outputs: tuple[int, ...] | None = None
    absent: str | None = None


def implementations(
    spec: OpSpec,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    arguments: dict[str, Any],
    wanted: Collection[str] = (),
) -> Iterator[Implementation]:
    """What may be timed for this op on this device: eager PyTorch, then those wanted, or all."""

    def asked(name: str) -> bool:
        return not wanted or name in wanted

    yield Implementation(EAGER, spec.torch_form)
    if asked(COMPILED):
        yield compiled(spec.torch_form)
    for name in spec.op.backends(device.type):
        if name not in ("torch", "reference") and asked(name):
            yield of_backend(spec, case, dtype, device, name)
    for peer in peers(spec.name):
        if asked(peer.label):
            yield of_peer(peer, spec, arguments, device)


def names(spec: OpSpec) -> list[str]:
    """The names that `implementations` and `of_backend` know for an op, on any device."""
    own = [name for name in spec.op.declared() if name not in ("torch", "reference")]
    return [EAGER, COMPILED, *own, *(peer.label for peer in peers(spec.name))]


def of_backend(
    spec: OpSpec, case: Case, dtype: torch.dtype, device: torch.device, name: str
) -> Implementation:
    """The public function, run strictly on one backend."""
    absent = spec.op.unsupported(name, device.type, dtype) or refusal(spec, case, dtype, name, device.type)
    if absent is None and device.type == "cpu" and name in ("triton", "gluon"):
        absent = "the interpreter is for checking and is never timed"
    context = partial(use_backend, f"{spec.op.name}={name}", strict=True)
    return Implementation(name, spec.function, context, absent=absent)


def of_peer(peer: Peer, spec: OpSpec, arguments: dict[str, Any], device: torch.device) -> Implementation:
    """A foreign stack's function under our signature, or why it cannot stand beside ours."""
    version = peer.version()
    absent = peer.supports(arguments, device=device.type)
    if peer.package and version is None:
        absent = f"{peer.package} is not installed (make peers)"
    function: Callable[..., Any] = spec.function
    if absent is None:
        try:
            function = peer.load()
        except Unavailable as reason:
            absent = str(reason)
    if peer.outputs is None:
        return Implementation(
            peer.label, function, foreign=True, version=version, absent=absent, directions=peer.directions
        )
    # With fewer outputs there are other gradients: the forward alone can be held against ours.
    outputs = tuple(spec.outputs.index(name) for name in peer.outputs)
    return Implementation(
        peer.label, function, foreign=True, version=version, absent=absent, outputs=outputs,
        directions=("forward",),
    )  # fmt: skip


def compiled(function: Callable[..., Any]) -> Implementation:
    """`torch.compile` of a function for the shapes of one case; a limit is set to the time that it takes."""
    torch._dynamo.reset()
    limit = partial(time_limit, COMPILE_SECONDS, f"torch.compile takes more than {COMPILE_SECONDS} s")
    return Implementation(COMPILED, torch.compile(function, dynamic=False), limit=limit)


class _TimeUp(BaseException):
    """Not an Exception, so that nothing that compiles takes it for a failure of its own."""


@contextmanager
def time_limit(seconds: int, message: str) -> Iterator[None]:
    """Raises Unavailable when the time is up; without an alarm clock, or outside the main thread, waits."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    except _TimeUp:
        raise Unavailable(message) from None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
