"""What a measuring process of `regress` does between two samples, and what of a sample counts."""

import itertools
import os
import subprocess
import sys
import time

import pytest
import torch

from rlhf_kernels.engine import turns_worker


@pytest.fixture(scope="module")
def side():
    """A side that runs here, on one thread."""
    before = torch.get_num_threads()
    yield turns_worker.Side("cpu", 1, "rlhf_kernels.ops")
    torch.set_num_threads(before)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_data_moves_and_stays_the_same(side, direction):
    target = ["swiglu", "small_64x512", "float32", direction, "torch"]
    assert side.prepare(target, check=False)["row"]["status"] == "ok"
    first, before = side.judge.inputs.args["x"], side.contender.call()
    places = {first.data_ptr()}
    for gap in (0, 100_000):
        assert side.move(gap)["seconds"] > 0
        x, after = side.judge.inputs.args["x"], side.contender.call()
        places.add(x.data_ptr())
        assert torch.equal(x, first)
        for old, new in zip(before, after):
            assert torch.equal(old, new)
        x.zero_()  # what is called reads the new place
        assert not torch.equal(side.contender.call()[0], before[0])
        x.copy_(first)
    assert len(places) == 3
    side.prepare(target, check=False)
    assert not side.earlier, "the next target has its memory"


def test_large_data_stays(side, monkeypatch):
    side.prepare(["swiglu", "small_64x512", "float32", "forward", "torch"], check=False)
    x = side.judge.inputs.args["x"]
    monkeypatch.setattr(turns_worker, "_MOVED", x.untyped_storage().nbytes() - 1)
    assert side.move(0) == {}
    assert side.judge.inputs.args["x"] is x


@pytest.mark.parametrize(
    ("waited", "own", "counts"),
    [(0.5, 1.4, 1.5), (0.0, 0.1, 2.0), (2.5, 0.1, 0.1), (0.1, 2.1, 2.0)],
    ids=["in the middle", "slept", "before the clock", "not at all"],
)
def test_waiting_for_a_core_does_not_count(side, monkeypatch, waited, own, counts):
    tell, processor = itertools.cycle([1.0, 1.0 + waited]), itertools.cycle([7.0, 7.0 + own])
    monkeypatch.setattr(side, "waiting", lambda: next(tell))
    monkeypatch.setattr(turns_worker.time, "thread_time", lambda: next(processor))
    monkeypatch.setattr(side, "contender", turns_worker.Contender("one", lambda: None))
    monkeypatch.setattr(side.clock, "sample", lambda contender: 2.0)
    assert side.sample(1)["seconds"] == pytest.approx(counts)


@pytest.mark.skipif(not os.path.exists("/proc/thread-self/schedstat"), reason="Linux tells")
def test_waiting_is_that_of_the_scheduler():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    rival = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    )
    try:
        rival.stdout.readline()
        waiting = turns_worker._waiting()
        before, wall, own = waiting(), time.perf_counter(), time.thread_time()
        while time.thread_time() - own < 0.05:
            pass
        wall, own, waited = time.perf_counter() - wall, time.thread_time() - own, waiting() - before
    finally:
        os.sched_setaffinity(0, allowed)
        rival.kill()
        rival.wait()
    assert waited > 0.01, "two on one core"
    assert wall - waited == pytest.approx(own, rel=0.1)
