"""Times several implementations side by side: warmed up, in rounds whose order is shuffled, samples kept.

A machine drifts: what is timed first may see another clock rate than what is timed last. So every round times
each contender once, in a new order, and the drift is shared. A round's sample is a batch of calls of at least
a millisecond. It ends when every median is known to `precision`, or when the time is used up.

    samples = measure([Contender("a", f), Contender("b", g)], CpuClock(), Limits(seconds=2))
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter_ns  # taken before any code of others could replace it
from typing import Any, Protocol

import torch

from rlhf_kernels.engine import stats

_BATCH_NS = 1_000_000
# The warm-up ends when this many samples lie within this of one another.
_STEADY_SAMPLES, _STEADY = 3, 0.05


@dataclass
class Contender:
    """One implementation: `call` takes no arguments, `context` holds while it is timed.

    `failure` is what a call raised while it was timed; its samples do not count then.
    """

    name: str
    call: Callable[[], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    batch: int = 1
    spent: float = 0.0
    samples: list[float] = field(default_factory=list)
    failure: BaseException | None = None


@dataclass(frozen=True)
class Limits:
    """When a measurement ends.

    Attributes:
        seconds: for all contenders together, the warm-up left out.
        precision: half the width of the median's 95 % interval, relative to the median.
        rounds: least samples of each contender.
        warmup: seconds for the warm-up of one contender at most.
    """

    seconds: float = 2.0
    precision: float = 0.01
    rounds: int = 9
    warmup: float = 0.5


class Clock(Protocol):
    """Measures batches of calls on one kind of device."""

    def sample(self, contender: Contender) -> float:
        """Seconds of one call, the mean of a batch."""

    def batch(self, seconds: float) -> int:
        """How many calls of this length are one sample."""

    def host(self, contender: Contender) -> float | None:
        """Seconds until a call returns, where the device works on by itself."""


class CpuClock:
    """Wall time of a batch of calls."""

    def sample(self, contender: Contender) -> float:
        """Seconds of one call, the mean of a batch."""
        call = contender.call
        with contender.context():
            start = perf_counter_ns()
            for _ in itertools.repeat(None, contender.batch):
                call()
            return (perf_counter_ns() - start) / contender.batch / 1e9

    def batch(self, seconds: float) -> int:
        """As many calls as fill a millisecond."""
        return max(1, round(_BATCH_NS / 1e9 / max(seconds, 1e-9) + 0.5))

    def host(self, contender: Contender) -> None:
        """On the CPU a call returns when it is done."""


class CudaClock:
    """Device time between events, one pair a call, with the second-level cache flushed before each call.

    A kernel that spins for longer than enqueueing the last batch took keeps the device from overtaking the
    host, so that the gaps between launches do not count; the time to enqueue one call is `host`.
    """

    _CALLS = 16
    _SPIN = (0.0005, 0.02)  # seconds, least and most

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._cache = torch.empty(2 * cache // 4, dtype=torch.int32, device=device)
        self._enqueueing: dict[str, float] = {}
        self._cycles = 1.0  # of the spinning kernel in a second
        spinning = self._events(1)
        with torch.cuda.device(device):
            for _ in range(20):  # the first includes loading the kernel; an idle GPU's clock rises by and by
                spinning[0][0].record()
                torch.cuda._sleep(10_000_000)
                spinning[0][1].record()
                torch.cuda.synchronize(device)
        self._cycles = 10_000_000 / self._seconds(spinning)[0]

    def sample(self, contender: Contender) -> float:
        """Seconds of one call on the device, the median of a batch."""
        events = self._events(contender.batch)
        least, most = self._SPIN
        spin = min(most, max(least, 1.5 * self._enqueueing.get(contender.name, most / 1.5)))
        with contender.context(), torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            torch.cuda._sleep(int(spin * self._cycles))
            for before, after in events:
                self._cache.zero_()
                before.record()
                contender.call()
                after.record()
            self._enqueueing[contender.name] = time.perf_counter() - start
            torch.cuda.synchronize(self.device)
            wall = time.perf_counter() - start
        seconds = self._seconds(events)
        if sum(seconds) > wall:
            raise RuntimeError(
                f"{contender.name}: events say {sum(seconds):.6f} s in {wall:.6f} s of wall time"
            )
        return stats.median(seconds)

    @staticmethod
    def _events(count: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        return [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]

    @staticmethod
    def _seconds(events: Sequence[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        return [before.elapsed_time(after) / 1e3 for before, after in events]

    def batch(self, seconds: float) -> int:
        """Calls of one sample: fewer where one takes milliseconds."""
        return max(1, min(self._CALLS, round(0.02 / max(seconds, 1e-6))))

    def host(self, contender: Contender) -> float:
        """Seconds to enqueue one call, on an idle device."""
        with contender.context(), torch.cuda.device(self.device):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(self._CALLS):
                contender.call()
            seconds = (time.perf_counter() - start) / self._CALLS
            torch.cuda.synchronize(self.device)
        return seconds


def clock_for(device: torch.device) -> Clock:
    """The clock of a kind of device.

    Raises:
        ValueError: there is none.
    """
    if device.type == "cpu":
        return CpuClock()
    if device.type == "cuda":
        return CudaClock(device)
    raise ValueError(f"there is no clock for {device.type}: expected cpu or cuda")


def measure(
    contenders: Sequence[Contender], clock: Clock, limits: Limits, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds of one call of each contender, one number a sample.

    A contender that has used its share of the time sits out, once it has three samples, so that a slow one
    does not starve the others. One whose call raises leaves the field without samples.
    """
    with _undisturbed():
        for contender in contenders:
            with _leaving(contender):
                _warm_up(contender, clock, limits)
        draw = random.Random(seed)
        start, share = time.perf_counter(), limits.seconds / max(len(contenders), 1)
        for round_number in itertools.count(1):
            playing = [c for c in contenders if not c.failure and (c.spent < share or len(c.samples) < 3)]
            for contender in draw.sample(playing, len(playing)):
                before = time.perf_counter()
                with _leaving(contender):
                    contender.samples.append(clock.sample(contender))
                contender.spent += time.perf_counter() - before
            if not playing or (time.perf_counter() - start > limits.seconds and round_number >= 3):
                break
            if round_number >= limits.rounds and all(
                c.failure or stats.precision(c.samples) <= limits.precision for c in playing
            ):
                break
    return {c.name: c.samples for c in contenders}


@contextmanager
def _leaving(contender: Contender) -> Iterator[None]:
    """A call that raises ends its contender's part and nobody else's."""
    try:
        yield
    except Exception as error:
        contender.failure = error
        contender.samples = []


def _warm_up(contender: Contender, clock: Clock, limits: Limits) -> None:
    """Calls until a call costs the same again and again; finds the size of a batch on the way."""
    contender.batch, contender.spent, contender.samples = 1, 0.0, []
    start, seen = time.perf_counter(), []
    while len(seen) < _STEADY_SAMPLES or time.perf_counter() - start < limits.warmup:
        seen.append(clock.sample(contender))
        last = seen[-_STEADY_SAMPLES:]
        batch = clock.batch(min(last))
        if (
            batch <= contender.batch
            and len(last) == _STEADY_SAMPLES
            and max(last) <= (1 + _STEADY) * min(last)
        ):
            return
        contender.batch = max(contender.batch, batch)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection while the clock runs."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
