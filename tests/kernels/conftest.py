"""What several test files share: the planted ops, and a cache of one's own."""

import timeit
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_kernels import cli
from rlhf_kernels.engine import roofs
from rlhf_kernels.engine.own import OwnOp
from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.runtime import dispatch, tuned


def scan_by_doubling(self, input):
    """Triton's interpreted associative_scan in log2(n) steps over whole arrays, as a GPU takes them; one
    element after another costs minutes of a test run."""
    axis = self.axis % len(input[0].handle.data.shape)
    n = input[0].handle.data.shape[axis]
    index = np.arange(n).reshape([-1 if i == axis else 1 for i in range(input[0].handle.data.ndim)])
    scanned, distance = list(input), 1
    while distance < n:
        before = [self.to_tensor(np.roll(t.handle.data, distance, axis), t.dtype) for t in scanned]
        found = self.combine_fn.fn(*before, *scanned)
        found = found if isinstance(found, tuple) else (found,)
        chosen = [np.where(index >= distance, f.handle.data, t.handle.data) for f, t in zip(found, scanned)]
        scanned = [self.to_tensor(data, t.dtype) for data, t in zip(chosen, scanned)]
        distance *= 2
    return scanned


try:
    from triton.runtime.interpreter import ScanOps
except ImportError:
    pass
else:
    ScanOps.one_by_one, ScanOps.generic_scan = ScanOps.generic_scan, scan_by_doubling


@pytest.fixture
def slowness():
    """How many times as long a call of ATen's layer_norm takes here as where limits in microseconds were set
    (4.2 us), at least 1: what those are multiplied by. A tenth more above 1: not all that a call does grows
    alike."""
    x, weight = torch.randn(2, 8), torch.ones(8)
    calls = partial(torch.ops.aten.native_layer_norm.default, x, [8], weight, weight, 1e-5)
    found = min(timeit.repeat(calls, number=200, repeat=300)) / 200 / 4.2e-6
    return 1.0 if found < 1 else 1.1 * found


@pytest.fixture
def planted_specs(monkeypatch):
    """The specs of planted_ops, which workers can import too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return load_specs("planted_ops.spec")


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache of its own; choices of kernels that depend on it are forgotten before and after."""
    monkeypatch.setenv("RLHF_KERNELS_CACHE", str(tmp_path))

    def forget():
        tuned.forget()
        for op in dispatch.OPS.values():
            op._chosen.clear()

    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


@pytest.fixture
def forgotten():
    """Ops of one's own that a test declared are no ops of the other tests."""
    yield
    load_specs.cache_clear()
    for name in [name for name, op in dispatch.OPS.items() if isinstance(op, OwnOp)]:
        del dispatch.OPS[name]


@pytest.fixture
def command(capsys):
    """Runs a command of rlhf-kernels: exit code, standard output, standard error."""

    def run(*words):
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def known_roofs(monkeypatch):
    """Roofs in the cache, where workers find them: to measure them takes seconds."""
    monkeypatch.setattr(roofs, "_COPIES", {"cpu": (1 << 12,)})
    monkeypatch.setattr(roofs, "_fastest", lambda call, clock: 1e-9)
    roofs.roofs_for(torch.device("cpu"), 1, [])


@pytest.fixture
def parsed():
    """Parses a page whose tags must be in balance: .ids, .refs, .counts of tags, .cells of tables."""
    return Page


class Page(HTMLParser):
    """Tags in balance, ids, references, and the text of table cells."""

    VOID = ("meta", "input", "br", "link", "img", "hr")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.refs, self.counts, self.cells = [], [], [], {}, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.refs += [
            attrs[name] for name in ("src", "href", "xlink:href", "srcset", "action") if name in attrs
        ]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data
