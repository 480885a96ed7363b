"""Times every implementation of an op at one case, after checking it, beside one another.

A direction is `forward` (no input requires a gradient) or `forward+backward` (autograd's own backward of all
differentiable outputs). The backward alone is not timed: to repeat it one has to keep the graph, which
compiled functions forbid and which changes what others allocate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from rlhf_kernels.engine import audit, stats
from rlhf_kernels.engine import implementations as known
from rlhf_kernels.engine.check import Judge, one_line, unmade
from rlhf_kernels.engine.clock import Clock, Contender, Limits, measure
from rlhf_kernels.engine.implementations import EAGER, Implementation
from rlhf_kernels.engine.memory import peak_bytes
from rlhf_kernels.engine.roofs import Roofs, copy_of
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.spec import Case, Cost, OpSpec, as_outputs
from rlhf_kernels.stacks import Unavailable

FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)


@dataclass
class Candidate:
    """An implementation with what its check said and what is called for each timed direction."""

    implementation: Implementation
    rows: dict[str, Row] = field(default_factory=dict)
    calls: dict[str, Callable[[], Any]] = field(default_factory=dict)


@dataclass
class Bench:
    """Times cases of ops on one device.

    Args:
        device, clock, roofs: where, and with what.
        threads: noted in the rows.
        limits: of one case and direction.
        wanted: names of implementations; none means all. Eager PyTorch is always timed.
        baseline: what speed-ups are over.
        directions: some of DIRECTIONS.
    """

    device: torch.device
    clock: Clock
    roofs: Roofs
    threads: int
    limits: Limits = field(default_factory=Limits)
    wanted: Sequence[str] = ()
    baseline: str = EAGER
    directions: Sequence[str] = DIRECTIONS

    def rows(self, spec: OpSpec, case: Case, dtype: torch.dtype) -> Iterator[Row]:
        """One row an implementation and direction; those that are not ok come with the reason."""
        try:
            judge = Judge(spec, case, dtype, self.device)
        except Exception as error:  # whatever a spec raises is its result
            yield unmade(spec, case, dtype, EAGER, self.device.type, error)
            return
        candidates = [self.candidate(judge, one) for one in self._implementations(judge)]
        for direction in self.directions:
            self._time(direction, candidates, judge)
            for candidate in candidates:
                if direction in candidate.rows:
                    yield candidate.rows[direction]

    def _time(self, direction: str, candidates: Sequence[Candidate], judge: Judge) -> None:
        """Measures what passed its check, together with a copy of as many bytes, and fills in the rows."""
        ready = [c for c in candidates if direction in c.calls]
        if not ready:
            return
        costs = costs_of(judge.spec, judge.case, judge.dtype, direction)
        contenders = [
            Contender(c.implementation.name, c.calls[direction], c.implementation.context) for c in ready
        ]
        copy = Contender("the roof", copy_of(costs, self.device))
        samples = measure([*contenders, copy], self.clock, self.limits)
        wrong = self._audit(direction, ready, contenders, judge)
        least = [self.roofs.seconds(costs, judge.dtype, copying) for copying in samples[copy.name]]
        base = next((samples[c.name] for c in contenders if c.name == self.baseline), [])
        for candidate, contender in zip(ready, contenders):
            row = candidate.rows[direction]
            try:
                if contender.failure:
                    raise contender.failure
                row.host_us = _scaled(self.clock.host(contender))
                with contender.context():
                    row.peak_bytes = peak_bytes(contender.call, self.device)
            except Exception as error:  # what passed its check may still fail later
                candidate.rows[direction] = row.failed("error", f"while it was timed: {one_line(error)}")
                continue
            if contender.name in wrong:
                candidate.rows[direction] = row.failed("incorrect", wrong[contender.name])
                continue
            candidate.rows[direction] = self._row(row, samples[contender.name], base, least, costs)

    def _audit(
        self, direction: str, ready: Sequence[Candidate], contenders: Sequence[Contender], judge: Judge
    ) -> dict[str, str]:
        """What timed calls do besides the work, or instead of it, by name."""
        fit = {c.name: c for c in contenders if not c.failure}
        outputs = {c.implementation.name: c.implementation.outputs for c in ready}
        eager = call_of(Implementation(EAGER, judge.spec.torch_form), judge, direction)
        wrong = audit.stale(judge, eager, fit, outputs if direction == FORWARD else {})
        for name, contender in fit.items():
            if name in wrong:
                continue
            if self.device.type == "cuda":
                found = audit.other_streams(contender, self.device)
            else:
                found = audit.elsewhere(contender, self.threads)
            if found:
                wrong[name] = found
        return wrong

    def _row(
        self, row: Row, samples: list[float], base: list[float], least: list[float], costs: list[Cost]
    ) -> Row:
        """A row with its time and what follows from it; an error where the time cannot be true.

        Args:
            row: checked, without a time.
            samples, base, least: seconds of this implementation, of the baseline and of the roof, by rounds.
            costs: what has to be done.
        """
        seconds = stats.median(samples)
        whole = Cost(sum(c.flops for c in costs), sum(c.bytes for c in costs))
        if self.roofs.suspicious(seconds, whole):
            seen, fastest = whole.bytes / seconds / 1e9, max(self.roofs.copy.values()) / 1e9
            return row.failed("error", f"suspicious: {seen:.3g} GB/s, and copies reach {fastest:.3g}")
        low, high = stats.median_ci(samples)
        faster = stats.paired(base, samples)
        return replace(
            row, median_us=seconds * 1e6, ci_us=(low * 1e6, high * 1e6), gbps=whole.bytes / seconds / 1e9,
            tflops=whole.flops / seconds / 1e12, roof_us=stats.median(least) * 1e6,
            roof_fraction=stats.median(stats.paired(least, samples)),
            speedup=stats.median(faster) if faster else None,
            speedup_ci=stats.median_ci(faster) if faster else None, baseline=self.baseline,
            flops=whole.flops, bytes=whole.bytes,
            samples_us=[[s * 1e6 for s in samples]],
        )  # fmt: skip

    def _implementations(self, judge: Judge) -> list[Implementation]:
        spec, case, dtype = judge.spec, judge.case, judge.dtype
        wanted = {*self.wanted, self.baseline} if self.wanted else ()
        found = list(known.implementations(spec, case, dtype, self.device, judge.inputs.args, wanted))
        elsewhere = set(self.wanted) & set(spec.op.declared()) - {one.name for one in found}
        return found + [known.of_backend(spec, case, dtype, self.device, name) for name in sorted(elsewhere)]

    def candidate(self, judge: Judge, one: Implementation) -> Candidate:
        """Checks an implementation; only what passed has something to call."""
        directions = [d for d in self.directions if d == FORWARD or judge.differentiable]
        candidate = Candidate(one)
        for direction in directions:
            candidate.rows[direction] = replace(
                judge.row(one.name, direction), threads=self.threads, version=one.version
            )
        if one.absent:
            return self._refused(candidate, directions, "unavailable", one.absent)
        checked = [d for d in judge.directions if d in one.directions]
        try:
            with one.limit(), one.context():
                # PyTorch's backwards of attention give other bits each time on a GPU.
                ours = one.name != EAGER and one.name in judge.spec.op.declared()
                rows = judge.rows(
                    one.name, one.function, checked, repeat=ours, foreign=one.foreign, outputs=one.outputs
                )
                found = {row.direction: row for row in rows}
                for direction in directions:
                    self._enter(candidate, direction, found, judge)
        except Unavailable as reason:
            return self._refused(candidate, directions, "unavailable", str(reason))
        except Exception as error:  # the first call of what is timed may still fail
            return self._refused(candidate, directions, "error", one_line(error))
        return candidate

    def _enter(self, candidate: Candidate, direction: str, found: dict[str, Row], judge: Judge) -> None:
        """Takes over the verdict on a direction, and makes and tries its call where the verdict is good."""
        one, row = candidate.implementation, candidate.rows[direction]
        parts = [found.get(d) for d in (("forward",) if direction == FORWARD else ("forward", "backward"))]
        if None in parts:
            candidate.rows[direction] = row.failed("unavailable", f"{one.name} has no backward")
            return
        worst = max(parts, key=lambda part: (part.status != "ok", _excess(part)))
        row.error, row.allowed = worst.error, worst.allowed
        if worst.status != "ok":
            candidate.rows[direction] = row.failed(worst.status, worst.reason)
            return
        call = call_of(one, judge, direction)
        call()
        candidate.calls[direction] = call

    def _refused(
        self, candidate: Candidate, directions: Sequence[str], status: Any, reason: str
    ) -> Candidate:
        candidate.calls.clear()
        for direction in directions:
            candidate.rows[direction] = candidate.rows[direction].failed(status, reason)
        return candidate


def _excess(row: Row) -> float:
    return (row.error or 0.0) / row.allowed if row.allowed else 0.0


def _scaled(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e6


def call_of(one: Implementation, judge: Judge, direction: str) -> Callable[[], Any]:
    """What is timed: a call without arguments, on the judge's inputs and its upstream gradients."""
    args = judge.inputs.args
    if direction == FORWARD:
        return partial(one.function, **args)
    leaves = {name: args[name].detach().requires_grad_() for name in judge.inputs.wrt}
    function = partial(one.function, **args | leaves)
    graded = [i for i, out in enumerate(as_outputs(function())) if out.requires_grad]
    upstream, inputs = [judge.upstream[i] for i in graded], list(leaves.values())

    def both() -> tuple[torch.Tensor, ...]:
        outputs = as_outputs(function())
        return torch.autograd.grad([outputs[i] for i in graded], inputs, upstream, allow_unused=True)

    return both


def costs_of(spec: OpSpec, case: Case, dtype: torch.dtype, direction: str) -> list[Cost]:
    """The work of a direction, one item a pass over the data."""
    passes = ("forward",) if direction == FORWARD else ("forward", "backward")
    return [spec.cost(case, dtype, one) for one in passes]


def merged(rows: Sequence[Row]) -> Row:
    """The same row of several processes as one: medians of their medians and of their own ratios.

    What failed in any of them failed.
    """
    for row in rows:
        if row.status != "ok":
            return row
    if len(rows) == 1:
        return rows[0]

    def of(name: str) -> list[float]:
        return [value for row in rows if (value := getattr(row, name)) is not None]

    medians = ("median_us", "gbps", "tflops", "host_us", "roof_us", "roof_fraction", "speedup")
    figures: dict[str, Any] = {name: stats.median(of(name)) if of(name) else None for name in medians}
    return replace(
        rows[0], **figures, ci_us=stats.median_ci(of("median_us")),
        speedup_ci=stats.median_ci(of("speedup")) if of("speedup") else None,
        samples_us=[samples for row in rows for samples in row.samples_us],
    )  # fmt: skip
