"""What the fixture `kernel_benchmark` of the pytest plug-in (pytest_rlhf_kernels.py) does.

pytest-benchmark times with a timer around calls. Here the clock of `bench` takes the samples first, warmed up
and stopped when the median is known; then pytest-benchmark is played those samples by a timer that jumps by
one sample a round. Its tables, files, comparisons and --benchmark-compare-fail then work on them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.engine import audit, stats
from rlhf_kernels.engine.bench import BOTH, FORWARD, call_of
from rlhf_kernels.engine.check import Judge
from rlhf_kernels.engine.clock import Clock, Contender, Limits, clock_for, measure
from rlhf_kernels.engine.conditions import unmet
from rlhf_kernels.engine.implementations import Implementation
from rlhf_kernels.engine.roofs import Roofs, copy_of, roofs_for
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.spec import Case, Cost, Inputs, OpSpec


class Replay:
    """A timer whose time passes by one sample whenever `next` is called."""

    def __init__(self) -> None:
        self.now = 0.0
        self._samples: Iterator[float] = iter(())

        def timer() -> float:
            return self.now

        timer.__name__ = "rlhf_kernels_clock"  # stands in saved files
        self.timer = timer

    def load(self, samples: Sequence[float]) -> None:
        """Seconds of one call each."""
        self._samples = iter(samples)

    def next(self) -> None:
        """Lets one sample pass."""
        self.now += next(self._samples)


class KernelBenchmark:
    """Checks, times and notes one kernel in one test.

    Args:
        benchmark: pytest-benchmark's fixture, whose timer is `replay.timer`.
        replay: that timer.
        limits: of the measurement.
        threads: of the CPU while it lasts.
    """

    def __init__(self, benchmark: Any, replay: Replay, limits: Limits, threads: int = 1) -> None:
        self.benchmark, self.replay, self.limits, self.threads = benchmark, replay, limits, threads

    def __call__(
        self,
        function: Callable[..., Any],
        *args: Any,
        reference: Callable[..., Any] | None = None,
        cost: Cost | None = None,
        backward_cost: Cost | None = None,
        wrt: Sequence[str | int] = (),
        floor: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Times `function(*args, **kwargs)` and returns what it gives.

        Args:
            function: the kernel; a Triton kernel is synchronised with by the clock.
            args, kwargs: of every call; the first tensor decides device and dtype.
            reference: the definition in plain PyTorch. With it the kernel is checked first, as `rlhf-kernels
                check` does: against the definition in float64, granted twice the error of the definition at
                the same dtype. Without it nothing is said of errors.
            cost: FLOPs and least bytes of a call; with it GB/s and the share of the measured roof are noted.
            backward_cost: of the backward alone, where `wrt` is given.
            wrt: names or positions of arguments that are differentiated: forward and backward are timed.
            floor: units in the last place that are granted besides.

        Raises:
            AssertionError: it is incorrect, answers from memory once it is timed, or its time is below what
                the machine can do.
            TypeError, ValueError: an argument is not what is expected.
        """
        __tracebackhide__ = True
        _expect_functions(function, reference)
        _expect_costs(cost, backward_cost)
        named = {f"_{i}": value for i, value in enumerate(args)} | kwargs
        tensor = next((value for value in named.values() if isinstance(value, Tensor)), None)
        if tensor is None:
            raise TypeError("kernel_benchmark: expected a tensor among the arguments, got none")
        names = _names(wrt, named)
        calls = [_by_name(one, len(args)) for one in (function, reference or function)]
        spec = _spec(self.benchmark.name, *calls, Inputs(named, names), floor)
        judge = Judge(spec, spec.cases[0], tensor.dtype, tensor.device)
        direction = BOTH if names else FORWARD
        info: dict[str, Any] = {"direction": direction}
        if reference:
            info |= _errors(judge.rows(self.benchmark.name, calls[0]))
        call = call_of(Implementation(self.benchmark.name, calls[0]), judge, direction)
        costs = [one for one in (cost, backward_cost if names else None) if one]
        complete = cost and (backward_cost or not names)
        watch = _audit(judge, calls[1], direction) if reference else None
        return self.timed(call, tensor.device, tensor.dtype, costs if complete else (), info, watch=watch)

    def timed(
        self,
        call: Callable[[], Any],
        device: torch.device,
        dtype: torch.dtype,
        costs: Sequence[Cost] = (),
        info: Mapping[str, Any] | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        watch: Callable[[Contender], str] | None = None,
    ) -> Any:
        """Times a call without arguments, which is taken to be right.

        Args:
            call: what is timed.
            device, dtype: of its tensors.
            costs: the work of a call, an item a pass over the data; empty notes no share of the roof.
            info: goes into `extra_info`.
            context: holds while it is called.
            watch: asked, once it was timed, what is wrong with it; empty where nothing is.

        Raises:
            AssertionError: `watch` found something, or its time is below what the machine can do.
        """
        __tracebackhide__ = True
        if self.benchmark.disabled:
            with context():
                return self.benchmark.pedantic(call)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            contender = Contender("kernel", call, context)
            samples, figures = self._measure(contender, device, dtype, costs)
            wrong = watch(contender) if watch else ""
            assert not wrong, f"it has no time: {wrong}"
        finally:
            torch.set_num_threads(before)
        self.benchmark.extra_info |= {**(info or {}), **figures}
        self.replay.load(samples)
        with context():
            result = call()
        self.benchmark.pedantic(self.replay.next, rounds=len(samples))
        return result

    def _measure(
        self, contender: Contender, device: torch.device, dtype: torch.dtype, costs: Sequence[Cost]
    ) -> tuple[list[float], dict[str, Any]]:
        """Seconds of a call by rounds, and what follows from them."""
        __tracebackhide__ = True
        clock = _clock(device)
        roof = [Contender("roof", copy_of(costs, device))] if costs else []
        samples = measure([contender, *roof], clock, self.limits)
        if contender.failure:
            raise contender.failure
        seconds = stats.median(samples["kernel"])
        low, high = stats.median_ci(samples["kernel"])
        figures = {
            "clock": type(clock).__name__, "device": str(device), "threads": self.threads,
            "batch": contender.batch, "ci": [low, high],
            "conditions_unmet": unmet(self.threads) if device.type == "cpu" else [],
        }  # fmt: skip
        if costs:
            roofs = _roofs(device, self.threads, dtype)
            whole = Cost(sum(one.flops for one in costs), sum(one.bytes for one in costs))
            assert not roofs.suspicious(seconds, whole), (
                f"{seconds * 1e6:.3g} us is too short for {whole.bytes:.0f} bytes on this machine"
            )
            least = [roofs.seconds(costs, dtype, copying) for copying in samples["roof"]]
            figures |= {
                "gbps": whole.bytes / seconds / 1e9,
                "tflops": whole.flops / seconds / 1e12,
                "roof_fraction": stats.median(stats.paired(least, samples["kernel"])),
            }
        return samples["kernel"], figures


@cache
def _clock(device: torch.device) -> Clock:
    return clock_for(device)


@cache
def _roofs(device: torch.device, threads: int, dtype: torch.dtype) -> Roofs:
    return roofs_for(device, threads, [dtype])


def _audit(judge: Judge, reference: Callable[..., Any], direction: str) -> Callable[[Contender], str]:
    """What `audit.stale` says of a call that was timed on the judge's inputs, which are reversed for it."""

    def watch(contender: Contender) -> str:
        spec = replace(judge.spec, make=lambda *_: judge.inputs.map(_reversed))
        plain = call_of(Implementation("reference", reference), judge, direction)
        judge.spec = spec
        return audit.stale(judge, plain, {contender.name: contender}, {}).get(contender.name, "")

    return watch


def _reversed(tensor: Tensor) -> Tensor:
    """Other values of its kind; what indexes or masks stays."""
    return tensor.detach().flip(-1) if tensor.is_floating_point() and tensor.dim() else tensor


def _expect_functions(function: Any, reference: Any) -> None:
    __tracebackhide__ = True
    for what, one in (("a function", function), ("reference=a function", reference)):
        if not callable(one) and (one is not None or one is function):
            raise TypeError(f"kernel_benchmark: expected {what}, got {one!r}")


def _expect_costs(cost: Any, backward_cost: Any) -> None:
    __tracebackhide__ = True
    for name, one in (("cost", cost), ("backward_cost", backward_cost)):
        if one is not None and not isinstance(one, Cost):
            raise TypeError(
                f"kernel_benchmark: expected {name}=rlhf_kernels.engine.spec.Cost(flops, bytes), got {one!r}"
            )


def _names(wrt: Any, named: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the differentiated arguments.

    Raises:
        ValueError: there is no such argument, or it is no tensor of floating-point numbers.
    """
    __tracebackhide__ = True
    able = [name for name, value in named.items() if isinstance(value, Tensor) and value.is_floating_point()]
    names = tuple(f"_{name}" if isinstance(name, int) else name for name in wrt)
    for given, name in zip(wrt, names):
        if name not in able:
            there = ", ".join(name[1:] if name[1:].isdigit() else repr(name) for name in able) or "none"
            raise ValueError(
                f"kernel_benchmark: wrt has {given!r}, expected positions, or names of keywords, of "
                f"floating-point tensors: {there}"
            )
    return names


def _by_name(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The function with its first `count` arguments by the names _0, _1, ..."""

    def call(**named: Any) -> Any:
        positional = [named.pop(f"_{i}") for i in range(count)]
        return function(*positional, **named)

    return call


def _spec(
    name: str, function: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs, floor: float
) -> OpSpec:
    case = Case("call", {})
    return OpSpec(
        name, "pytest", "", function, reference, reference, lambda *_: replace(inputs),
        lambda *_: Cost(0, 0), (case,), floor=floor,
    )  # fmt: skip


def _errors(rows: Sequence[Row]) -> dict[str, Any]:
    """The largest error over all directions beside what is allowed.

    Raises:
        AssertionError: one of them is not right.
    """
    __tracebackhide__ = True
    for row in rows:
        assert row.status == "ok", f"not timed, because the {row.direction} is {row.status}: {row.reason}"
    worst = max(rows, key=lambda row: (row.error or 0.0) / row.allowed if row.allowed else 0.0)
    return {"error": worst.error, "allowed": worst.allowed}
