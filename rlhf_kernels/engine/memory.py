"""The most memory that a call holds at once, above what was held before it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes of tensors that `call` holds at once at most; calls it once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU allocator keeps no count of its own; the profiler sees each allocation and release.
    seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _without_marks():
        seen.start()
    try:
        call()
    finally:
        with _without_marks():
            seen.stop()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _without_marks() -> Iterator[None]:
    """Leaves out the lines that Kineto writes whenever it starts or stops (`USDT:... profiler_start`).

    Its level of logging is read when torch is loaded, which is long ago.
    """
    if sys.stderr:
        sys.stderr.flush()
    try:
        held = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    with tempfile.TemporaryFile() as words:
        os.dup2(words.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(held, 2)
            os.close(held)
            words.seek(0)
            other = [line for line in words if not line.startswith(b"USDT:")]
            os.write(2, b"".join(other))
