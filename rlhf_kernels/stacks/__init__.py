"""Foreign stacks: which of their functions do what ours do, and with which meaning.

One file per stack declares its `PEERS`. The peers of `bench`, the parity tests and `patch` are loops over
them. Nothing foreign is imported before `Peer.load()`. The stacks may be installed beside the library, or in
`.peers` by `make peers`; `activate()` puts the latter on the path.

    for peer in peers("gae"):
        reason = peer.supports({"gamma": 0.99, "mask": mask})
        function = peer.load() if reason is None else None      # Unavailable says why it cannot be had
"""

from __future__ import annotations

from importlib import import_module

from rlhf_kernels.stacks.peer import Peer, Unavailable, activate, peers_root, search_paths

STACKS = (
    "palm_rlhf_pytorch",
    "trl",
    "verl",
    "openrlhf",
    "transformers",
    "torchrl",
    "liger",
    "pytorch",
    "baselines",
)

__all__ = ["STACKS", "Peer", "Unavailable", "activate", "peers", "peers_root", "search_paths"]


def peers(op: str | None = None, stack: str | None = None) -> list[Peer]:
    """The declared peers, of one operator and of one stack if these are named, in the order of `STACKS`."""
    if stack is not None and stack not in STACKS:
        raise ValueError(f"peers(): unknown stack {stack!r}; known are {', '.join(STACKS)}")
    names = STACKS if stack is None else (stack,)
    declared = [peer for name in names for peer in import_module(f"{__name__}.{name}").PEERS]
    return [peer for peer in declared if op is None or peer.op == op]
