"""What several test files share: the planted ops, and a cache of one's own."""

from pathlib import Path

import pytest

from rlhf_kernels.engine.spec import load_specs
from rlhf_kernels.runtime import dispatch, tuned


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
