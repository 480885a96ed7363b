"""The loop around every kind of training: progress, metrics, checkpoints, interruption, resuming.

It knows no algorithm. What trains is a `Learner`: one `step` is one update, and its parts are named so that a
run that was stopped goes on bit for bit.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from palm_rlhf.trainers.checkpoints import Checkpoints
from palm_rlhf.trainers.log import RunLog
from palm_rlhf.trainers.ranks import ranks


class Learner(Protocol):
    """Something that learns by steps."""

    # Shown while it runs, such as "ppo".
    name: str

    def step(self, index: int) -> Mapping[str, float]:
        """One update, the first with index 0; returns what to log."""
        ...

    def modules(self) -> Mapping[str, nn.Module]:
        """What is trained or has state, by the names under which checkpoints hold it."""
        ...

    def optimizers(self) -> Mapping[str, torch.optim.Optimizer]:
        """By the same kind of names."""
        ...

    def generators(self) -> Mapping[str, torch.Generator]:
        """All sources of randomness; PyTorch's global one is added by itself."""
        ...

    def extra_state(self) -> dict[str, Any]:
        """Anything else that a resumed run needs: numbers, strings, lists, tensors."""
        ...

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes that back."""
        ...


class Interrupted(Exception):
    """Training was stopped by Ctrl-C. `checkpoint` has all up to `step`; it is None before the first step."""

    def __init__(self, step: int, checkpoint: Path | None) -> None:
        super().__init__(f"stopped after step {step}; the checkpoint is {checkpoint}")
        self.step, self.checkpoint = step, checkpoint


def run(
    learner: Learner,
    log: RunLog,
    checkpoints: Checkpoints,
    *,
    steps: int,
    save_every: int = 100,
    progress: bool = True,
) -> int:
    """Trains up to step number `steps`, from the last checkpoint where there is one.

    Returns:
        The number of steps done in this call.

    Raises:
        Interrupted: Ctrl-C, or SIGTERM; the step under way was finished and saved first.
        KeyboardInterrupt: a second one, which does not wait.
        CheckpointError: the last checkpoint is damaged or of another learner.
    """
    there = ranks()
    with _interruptible() as interrupted:
        start = checkpoints.restore(learner)
        if there.main:
            log.resume_at(start)
        with log.progress(learner.name, start, steps, progress and there.main) as advance:
            _steps(learner, log, checkpoints, range(start, steps), save_every, advance, interrupted)
    # What follows may read what was written.
    there.wait()
    return max(0, steps - start)


def _steps(
    learner: Learner,
    log: RunLog,
    checkpoints: Checkpoints,
    indices: range,
    save_every: int,
    advance: Callable[[Mapping[str, float]], None],
    interrupted: threading.Event,
) -> None:
    there = ranks()
    if indices and there.any(interrupted.is_set()):
        raise Interrupted(indices.start, checkpoints.last)
    for index in indices:
        began = time.perf_counter()
        metrics = dict(learner.step(index))
        metrics["seconds"] = time.perf_counter() - began
        if there.main:
            log.write(index + 1, metrics)
        advance(metrics)
        # A signal reaches one process sooner than another.
        last, stop = index + 1 == indices.stop, there.any(interrupted.is_set())
        if last or stop or (save_every and (index + 1) % save_every == 0):
            if there.main:
                log.flush()
            saved = checkpoints.save(learner, index + 1)
            if stop and not last:
                raise Interrupted(index + 1, saved)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM sets the event, the second interrupts. Outside the main thread: nothing."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    for number in before:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
