"""Several processes that train together do what one does."""

from itertools import chain
from pathlib import Path

import pytest
import torch

from palm_rlhf.trainers.log import read_metrics
from palm_rlhf.trainers.ranks import Ranks, ranks
from rlhf_kernels.stacks import activate
from tests.palm.command_line import without_clock
from tests.palm.processes import SHARED, launched, train


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of all runs in two processes."""
    activate()
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("two")
    launched(2, folder)
    return folder


@pytest.mark.filterwarnings("ignore::rlhf_kernels.runtime.dispatch.FallbackWarning")
@pytest.mark.parametrize("kind", SHARED)
def test_two_processes_on_the_cpu_do_what_one_does(two, tmp_path, kind):
    alone = train(kind, tmp_path / kind, 3)
    first, second = (torch.load(two / f"{kind}-{index}.pt") for index in range(2))
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
        # They stay together to the last bit.
        assert torch.equal(first[name], second[name]), name
    rows, expected = without_clock(two / kind), without_clock(tmp_path / kind)
    assert len(rows) == 3
    for mine, theirs in zip(rows, expected):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    # One of them writes, and nothing twice.
    here, there = (
        {path.name for path in (folder / kind).rglob("*") if "events" not in path.name}
        for folder in (two, tmp_path)
    )
    assert here == there
    assert len(read_metrics(two / kind / "metrics.jsonl")) == 3


@pytest.mark.parametrize(("length", "multiple"), [(12, 1), (7, 1), (1, 1), (12, 4), (14, 4), (0, 1)])
def test_shares_are_everything_once_in_whole_groups(length, multiple):
    shares = []
    for index in range(3):
        one = Ranks()
        one.index, one.count = index, 3
        shares.append(list(range(length))[one.share(length, multiple)])
    assert list(chain(*shares)) == list(range(length))
    assert all(len(share) % multiple == 0 for share in shares[:-1])
    assert max(map(len, shares)) - min(map(len, shares)) <= 2 * multiple


def test_a_launch_that_started_one_process_instead_of_several_says_so(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="was to start several processes and started one"):
        ranks.__wrapped__()


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launch_that_cuts_models_in_shards_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match="each process holds the whole model"):
        ranks.__wrapped__()


def test_accelerate_reads_the_configuration():
    activate()
    config = pytest.importorskip("accelerate.commands.config.config_args")
    file = Path(__file__).parents[2] / "examples" / "accelerate" / "processes.yaml"
    found = config.load_config_from_file(str(file))
    # As accelerate does it: a field that it does not know is an error.
    assert (found.distributed_type, found.num_processes, found.use_cpu) == ("MULTI_GPU", 2, False)
