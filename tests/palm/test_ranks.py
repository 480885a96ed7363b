"""Several processes that train together do what one does."""

import functools
from itertools import chain
from pathlib import Path

import pytest
import torch

from palm_rlhf.trainers.log import read_metrics
from palm_rlhf.trainers.ranks import Ranks, ranks
from rlhf_kernels.stacks import activate
from tests.palm.command_line import without_clock
from tests.palm.processes import SHARDED, SHARED, failed, launched, train


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of all runs in two processes."""
    activate()
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("two")
    launched(2, folder)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A kind's folder and weights in one process; each is trained once."""
    folder = tmp_path_factory.mktemp("one")
    return functools.cache(lambda kind: (folder / kind, train(kind, folder / kind, 3)))


@pytest.mark.filterwarnings("ignore::rlhf_kernels.runtime.dispatch.FallbackWarning")
@pytest.mark.parametrize(
    ("kind", "shards"), [*((kind, "") for kind in SHARED), *((kind, "shards") for kind in SHARDED)]
)
def test_two_processes_on_the_cpu_do_what_one_does(two, one, kind, shards):
    (straight, alone), several = one(kind), two / shards
    first, second = (torch.load(several / f"{kind}-{index}.pt") for index in range(2))
    assert first.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=1e-6, msg=name)
        # They stay together to the last bit.
        assert torch.equal(first[name], second[name]), name
    rows, expected = without_clock(several / kind), without_clock(straight)
    assert len(rows) == 3
    for mine, theirs in zip(rows, expected):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    # One of them writes, and nothing twice.
    here, there = (
        {path.name for path in folder.rglob("*") if "events" not in path.name}
        for folder in (several / kind, straight)
    )
    assert here == there
    assert len(read_metrics(several / kind / "metrics.jsonl")) == 3


def test_each_process_holds_its_shards_of_weights_and_optimizer(two):
    (first, whole), (second, _) = (torch.load(two / f"held-{index}.pt") for index in range(2))
    assert first + second == whole
    assert max(first, second) <= 0.51 * whole


def test_a_reward_that_fails_in_one_process_ends_all(tmp_path):
    activate()
    pytest.importorskip("accelerate")
    first, second = failed(2, tmp_path, seconds=90)
    assert second == "KeyError: 'no score'"
    assert first == "ValueError: process 1 of 2 failed with KeyError: 'no score'"


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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "FSDP2 cuts models here"),
        ({"ACCELERATE_USE_FSDP": "true"}, "the launch needs fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "offload"),
    ],
)
def test_a_launch_that_cuts_models_otherwise_is_refused(monkeypatch, given, said):
    for name, value in (given | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{said}.* examples/accelerate/fsdp2.yaml"):
        ranks.__wrapped__()


@pytest.mark.parametrize(("name", "kind"), [("processes", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_the_configurations(name, kind):
    activate()
    config = pytest.importorskip("accelerate.commands.config.config_args")
    file = Path(__file__).parents[2] / "examples" / "accelerate" / f"{name}.yaml"
    found = config.load_config_from_file(str(file))
    # As accelerate does it: a field that it does not know is an error.
    assert (found.distributed_type, found.num_processes, found.use_cpu) == (kind, 2, False)
    assert kind != "FSDP" or found.fsdp_config["fsdp_version"] == 2
