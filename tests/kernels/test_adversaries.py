"""Implementations that cheat: each is right when it is checked, and has no time in the end."""

import itertools
import threading
import time

import pytest
import torch

from rlhf_kernels.engine import audit, roofs
from rlhf_kernels.engine.bench import Bench
from rlhf_kernels.engine.clock import Contender, CpuClock, Limits
from rlhf_kernels.engine.implementations import EAGER, Implementation
from rlhf_kernels.ops.swiglu import kernel_torch
from rlhf_kernels.ops.swiglu.spec import SPECS

SWIGLU = SPECS[0]
CPU = torch.device("cpu")
SHORT = Limits(seconds=0.02, warmup=0.02, rounds=3, precision=0.5)
# The check calls the function twice, and the entry to the clock once.
CHECKED = 3


def swiglu(x, gate=None, gate_first=False):
    return kernel_torch.swiglu(x, gate, gate_first=gate_first)


def honest():
    return swiglu


def returns_zeros():
    def function(x, **options):
        return torch.zeros(x.shape[0], x.shape[1] // 2)

    return function


def returns_zeros_when_timed():
    calls = itertools.count()

    def function(x, **options):
        zeros = torch.zeros(x.shape[0], x.shape[1] // 2)
        return swiglu(x, **options) if next(calls) < CHECKED else zeros

    return function


def reuses_a_result():
    results = []

    def function(x, **options):
        results.append(results[0] if results else swiglu(x, **options))
        return results[0]

    return function


def caches_by_address():
    known = {}

    def function(x, **options):
        if x.data_ptr() not in known:
            known[x.data_ptr()] = swiglu(x, **options)
        return known[x.data_ptr()].clone()

    return function


def hands_out_one_buffer():
    buffers = {}

    def function(x, **options):
        result = swiglu(x, **options)
        return buffers.setdefault(x.shape, torch.empty_like(result)).copy_(result)

    return function


def writes_its_inputs():
    def function(x, **options):
        out = swiglu(x, **options)
        x.data.mul_(1.0 + 1e-6)
        return out

    return function


def works_on_another_thread():
    def function(x, **options):
        found = []
        worker = threading.Thread(target=lambda: found.append(swiglu(x, **options)))
        worker.start()
        worker.join()
        return found[0]

    return function


def goes_on_after_it_returned():
    calls = itertools.count()

    def function(x, **options):
        if next(calls) < CHECKED:
            return swiglu(x, **options)
        out = torch.empty(x.shape[0], x.shape[1] // 2)

        def fill():
            until = time.thread_time() + 0.004
            while time.thread_time() < until:
                out.copy_(swiglu(x, **options))

        worker = threading.Thread(target=fill)
        worker.start()
        worker.join(0.001)
        return out

    return function


def returns_early():
    """Leaves the last quarter of the rows to whatever memory holds, once nobody looks."""
    calls = itertools.count()

    def function(x, **options):
        rows = x.shape[0] if next(calls) < CHECKED else x.shape[0] * 3 // 4
        out = torch.empty(x.shape[0], x.shape[1] // 2)
        out[:rows] = swiglu(x[:rows], **options)
        return out

    return function


def deletes_itself():
    kernels = {"swiglu": swiglu}
    calls = itertools.count()

    def function(x, **options):
        if next(calls) == CHECKED + 4:
            del kernels["swiglu"]
        return kernels["swiglu"](x, **options)

    return function


# Which of them shows first is a matter of how fast the thread is.
LATE = ("other threads computed", "after its calls", "wrong answer", "an earlier result of its changed")


class Planted(Bench):
    """A bench of plain PyTorch and one function of the test's."""

    function = staticmethod(swiglu)

    def _implementations(self, judge):
        return [
            Implementation(EAGER, judge.spec.torch_form),
            Implementation("planted", self.function, directions=("forward",)),
        ]


def _bench(function, case="small_64x512"):
    machine = roofs.Roofs({1 << 20: 1e15}, {"float32": 1e15})
    bench = Planted(CPU, CpuClock(), machine, 1, SHORT, directions=["forward"])
    bench.function = function
    return {row.impl: row for row in bench.rows(SWIGLU, SWIGLU.case(case), torch.float32)}


@pytest.mark.parametrize(
    ("plant", "status", "reason"),
    [
        (honest, "ok", ""),
        (returns_zeros, "incorrect", "the output is off by"),
        (returns_zeros_when_timed, "incorrect", "a wrong answer to new inputs"),
        (reuses_a_result, "incorrect", "a wrong answer to new inputs"),
        (caches_by_address, "incorrect", "a wrong answer to new inputs"),
        (hands_out_one_buffer, "incorrect", "an earlier result of its changed"),
        (writes_its_inputs, "incorrect", "it wrote to its inputs"),
        (works_on_another_thread, "incorrect", "other threads computed for"),
        (goes_on_after_it_returned, "incorrect", LATE),
        (returns_early, "incorrect", "a wrong answer to new inputs"),
        (deletes_itself, "error", "while it was timed: KeyError: 'swiglu'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_every_one_is_caught(plant, status, reason):
    rows = _bench(plant())
    assert rows[EAGER].status == "ok", rows[EAGER].reason
    row = rows["planted"]
    assert (row.status, row.median_us is not None) == (status, status == "ok"), row.reason
    reasons = (reason,) if isinstance(reason, str) else reason
    assert any(one in row.reason for one in reasons), row.reason


def test_inputs_are_restored_for_the_next():
    rows = [_bench(swiglu)["planted"] for _ in range(2)]
    assert rows[0].error == rows[1].error


def test_one_that_fails_does_not_stop_the_others():
    rows = _bench(deletes_itself())
    assert len(rows[EAGER].samples_us[0]) >= 3


def test_a_clock_that_was_replaced_is_not_asked(monkeypatch):
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 0)
    contender = Contender("sleep", lambda: time.sleep(0.001))
    assert CpuClock().sample(contender) >= 0.001


def test_the_clock_costs_less_than_a_microsecond():
    """Of one sample, and of each call of a batch."""
    one, many = Contender("one", int), Contender("many", int, batch=1000)
    own = min(CpuClock().sample(Contender("bare", int, batch=100_000)) for _ in range(5))
    assert min(CpuClock().sample(one) for _ in range(200)) - own < 1e-6
    assert min(CpuClock().sample(many) for _ in range(50)) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_another_stream_is_caught():
    device = torch.device("cuda")
    x, y = torch.empty(2, 1 << 28, device=device).unbind()
    side = torch.cuda.Stream(device)

    def aside():
        with torch.cuda.stream(side):
            y.copy_(x)

    for call in (aside, lambda: y.copy_(x)):
        call()
    assert audit.other_streams(Contender("aside", aside), device).startswith("another stream worked for")
    assert audit.other_streams(Contender("honest", lambda: y.copy_(x)), device) == ""
