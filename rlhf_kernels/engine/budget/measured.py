"""What a compiler or a counter says of one kernel, and where such answers are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_kernels.runtime.files import ROOT, cache_directory, write_aside

CSRC = ROOT / "csrc"


@dataclass(frozen=True)
class Measured:
    """One kernel in one configuration.

    Attributes:
        family: the room.
        op: the public function, or the family where kernels serve several.
        kind: triton (and Gluon, ahead of time), cuda (nvcc) or host (instructions of the CPU row kernels).
        name: of the kernel and its configuration.
        target: what it was compiled for.
        figures: what the budget holds.
        notes: what is shown beside it.
        faults: what no budget excuses.
        status: ok, unavailable or error; without figures unless ok.
        reason: why it is not ok.
        source: digest of all that the figures depend on, where the kind has one for every kernel.
    """

    family: str
    op: str
    kind: str
    name: str
    target: str
    figures: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    status: str = "ok"
    reason: str = ""
    source: str = ""

    @property
    def key(self) -> str:
        """The name of its budget."""
        return f"{self.op}/{self.name}/{self.target}"


# Digest of a source -> the name of a budget -> the figures recorded of that source.
Recorded = Mapping[str, Mapping[str, Mapping[str, int]]]


def owner(key: str) -> Measured:
    """The kernel that a budget's name speaks of."""
    op, _, rest = key.partition("/")
    name, _, target = rest.rpartition("/")
    kind = name.partition("/")[0]
    return Measured("", op, kind if kind in ("cuda", "host") else "triton", name, target)


def digest(*parts: Any) -> str:
    """A name for what an answer depends on: strings, numbers, paths (their content), bytes."""
    found = hashlib.sha256()
    for part in parts:
        content = part.read_bytes() if isinstance(part, Path) else part
        found.update(content if isinstance(content, bytes) else repr(content).encode())
        found.update(b"\0")
    return found.hexdigest()


def recall(key: str) -> Any | None:
    """The answer kept under this digest, or None."""
    try:
        return json.loads((cache_directory() / "budget" / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None


def remember(key: str, answer: Any) -> None:
    """Keeps an answer; a cache that cannot be written is no error."""
    with suppress(OSError):
        write_aside(cache_directory() / "budget" / f"{key}.json", json.dumps(answer))
