"""The store: what is read is what was appended, whatever ended the process; memory does not grow with it."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from palm_rlhf.rollout import Rollout
from palm_rlhf.rollout.store import FILE, RolloutStore
from tests.palm.test_rollout import made, real, tensors


def same(one: Rollout, other: Rollout) -> None:
    """Bit for bit, types included."""
    one, other = one.trimmed(), other.trimmed()
    assert one.temperature == other.temperature
    assert tensors(one).keys() == tensors(other).keys()
    for name, value in tensors(one).items():
        mine, theirs = value, tensors(other)[name]
        assert mine.dtype == theirs.dtype, name
        # What stands in a masked slot is no part of a rollout.
        if mine.dim() > 1 and name not in ("tokens", "mask"):
            mine, theirs = mine[one.mask], theirs[other.mask]
        assert torch.equal(mine, theirs), name


def rollout(seed: int, **more) -> Rollout:
    """Five responses of different lengths, in three groups."""
    found = made([2, 1, 4, 4, 3], [3, 6, 1, 2, 6], seed=seed)
    seeds = torch.tensor([2**62 + seed, 0, 1, 2, 3])
    return replace(
        found, group=torch.tensor([0, 0, 1, 1, 2]), generation=replace(found.generation, seeds=seeds), **more
    )


@pytest.fixture
def filled(tmp_path) -> tuple[Path, list[Rollout]]:
    """A folder with three rollouts, and these."""
    rollouts = [rollout(0), made([1, 1], [4, 2], seed=1), rollout(2)]
    store = RolloutStore(tmp_path / "store")
    assert [store.append(each) for each in rollouts] == [slice(0, 5), slice(5, 7), slice(7, 12)]
    return tmp_path / "store", rollouts


def test_what_is_read_is_what_was_appended(filled):
    folder, rollouts = filled
    for store in (RolloutStore(folder), RolloutStore(str(folder))):
        assert len(store) == 12
        assert store.dropped is None
        assert [row["step"] for row in store.rollouts] == [0, 1, 2]
        assert store.bytes == (folder / FILE).stat().st_size
        for found, expected in zip(store, rollouts, strict=True):
            same(found, expected)
    assert RolloutStore(folder.with_name("other")).bytes == 0
    assert not folder.with_name("other").exists(), "nothing is written before there is anything to write"


@pytest.mark.parametrize("values", [1000, 100_000], ids=["int16", "int32"])
def test_columns_of_other_types_and_sizes(tmp_path, values):
    given = rollout(0)
    tokens = given.generation.tokens * values
    ids = torch.randint(0, values, (*given.mask.shape, 3))
    given = replace(
        given, generation=replace(given.generation, tokens=tokens), values=given.values.double(),
        head_ids=ids, head_logprob=-torch.rand(ids.shape), returns=None,
    )  # fmt: skip
    store = RolloutStore(tmp_path)
    store.append(given)
    same(store.rollout(0), given)
    assert store.rollout(0).returns is None


def test_rows_come_in_the_order_asked_for(filled):
    folder, rollouts = filled
    store, every = RolloutStore(folder), [row for each in rollouts for row in real(each)]
    for index in (3, -1, slice(2, 9), [11, 0, 5, 6, 4], torch.tensor([7, 1]), torch.arange(12) % 3 > 0):
        numbers = torch.arange(12)[index].flatten().tolist()
        assert real(store[index]) == [every[i] for i in numbers], index
    assert store[[0, 7]].group is not None
    assert store[[0, 5]].group is None, "one of the rollouts has none"
    first, last = store[slice(0, 5)].group, store[slice(7, 12)].group
    both = store[[*range(5), *range(7, 12)]].group
    assert torch.equal(both[:5], first)
    assert torch.equal(both[5:], last)
    assert not set(first.tolist()) & set(last.tolist()), "groups of two rollouts are not one"
    for wrong in (12, -13, [0, 99]):
        with pytest.raises(IndexError, match="the store has 12"):
            store[wrong]
    with pytest.raises(IndexError, match="a mask of 5 booleans"):
        store[torch.ones(5, dtype=torch.bool)]
    for nothing in (slice(12, None), torch.zeros(12, dtype=torch.bool)):
        with pytest.raises(IndexError, match="no response was asked for"):
            store[nothing]


def test_minibatches_are_those_of_a_rollout(tmp_path):
    store, both = RolloutStore(tmp_path), [rollout(0), rollout(1)]
    for each in both:
        store.append(each)
    for groups in (False, True):
        found = list(store.minibatches(4, torch.Generator().manual_seed(3), groups=groups))
        again = list(store.minibatches(4, torch.Generator().manual_seed(3), groups=groups))
        assert [len(part) for part in found] == [4, 4, 2]
        rows = [row for part in found for row in real(part)]
        assert rows == [row for part in again for row in real(part)]
        assert sorted(rows, key=str) == sorted((row for each in both for row in real(each)), key=str)
    order = torch.cat([part.group for part in found]).tolist()
    assert len([1 for a, b in pairwise(order) if a != b]) == 5, "six groups, each in one piece"


def test_rollouts_at_two_temperatures_are_not_one(tmp_path):
    store = RolloutStore(tmp_path)
    store.append(rollout(0))
    store.append(rollout(1, temperature=1.0))
    assert [each.temperature for each in store] == [0.7, 1.0]
    with pytest.raises(ValueError, match=r"temperatures \[0.7, 1.0\]"):
        store[[0, 9]]


def cuts(folder: Path) -> list[int]:
    """Places at which the last rollout may have been cut: in each of its parts, and at their ends."""
    whole, start = (folder / FILE).stat().st_size, sum(r["bytes"] for r in RolloutStore(folder).rollouts[:2])
    return [start + 1, start + 8, start + 31, start + 32, start + 200, (start + whole) // 2, whole - 1]


def test_a_half_written_rollout_is_dropped_and_written_again(filled, tmp_path):
    folder, rollouts = filled
    for number, cut in enumerate(cuts(folder)):
        copy = tmp_path / f"cut-{number}"
        shutil.copytree(folder, copy)
        with (copy / FILE).open("r+b") as file:
            file.truncate(cut)
        with pytest.warns(RuntimeWarning, match="no whole rollout, as after a crash, and are left out"):
            store = RolloutStore(copy)
        assert store.dropped.endswith("the 2 rollouts before them are there")
        assert len(store) == 7
        same(store.rollout(1), rollouts[1])
        assert store.append(rollouts[2]) == slice(7, 12)
        assert store.dropped is None
        same(RolloutStore(copy).rollout(2), rollouts[2])


@pytest.mark.filterwarnings("ignore:.*no whole rollout")
def test_what_a_crash_of_the_machine_leaves_is_dropped(filled, tmp_path):
    """Lengths that were written without their contents: zeros behind the end, or inside the last rollout."""
    folder, rollouts = filled
    whole = (folder / FILE).read_bytes()
    last = len(whole) - RolloutStore(folder).rollouts[2]["bytes"]
    for number, (bytes_there, count) in enumerate(
        (
            (whole + bytes(1000), 3),
            (whole[:-200] + bytes(200), 2),
            (whole[:last] + bytes(len(whole) - last), 2),
            (whole[:5], 0),
        )
    ):
        copy = tmp_path / f"crash-{number}"
        copy.mkdir()
        (copy / FILE).write_bytes(bytes_there)
        store = RolloutStore(copy)
        assert store.dropped
        assert len(store.rollouts) == count
        store.append(rollouts[0])
        same(RolloutStore(copy).rollout(-1), rollouts[0])


def test_damage_elsewhere_is_told_when_it_is_read(filled):
    folder, rollouts = filled
    data = bytearray((folder / FILE).read_bytes())
    data[RolloutStore(folder).rollouts[0]["bytes"] - 70] ^= 1
    (folder / FILE).write_bytes(data)
    store = RolloutStore(folder)
    with pytest.raises(ValueError, match="the rollout of step 0 is damaged"):
        store[0]
    same(store.rollout(1), rollouts[1])


def test_steps_that_are_done_again_replace_what_they_left(filled):
    folder, rollouts = filled
    store = RolloutStore(folder)
    store.append(rollouts[0], step=1)
    assert [row["step"] for row in store.rollouts] == [0, 1]
    same(store.rollout(1), rollouts[0])
    same(RolloutStore(folder).rollout(1), rollouts[0])


def test_what_is_no_store_is_refused(tmp_path, filled):
    folder, rollouts = filled
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        RolloutStore(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match="is no store of rollouts"):
        RolloutStore(tmp_path / "other")
    one, other = RolloutStore(folder), RolloutStore(folder)
    one.append(rollouts[1])
    with pytest.raises(ValueError, match="another process has written"):
        other.append(rollouts[1])
    hole = rollouts[0]
    hole.generation.mask[1, 5] = False
    with pytest.raises(ValueError, match="a hole"):
        one.append(hole)
    assert len(one) == 14


def anonymous_memory() -> int:
    """Bytes of this process that are not files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no RssAnon")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_store(tmp_path):
    """48 MB, of which a minibatch takes 1.5 MB."""
    ids = torch.randint(0, 1000, (8, 200, 120))
    wide = made([4] * 8, [200] * 8)
    wide = replace(wide, head_ids=ids, head_logprob=-torch.rand(ids.shape))
    store = RolloutStore(tmp_path)
    for _ in range(32):
        store.append(wide)
    assert store.bytes > 48e6
    del wide, ids
    store = RolloutStore(tmp_path)
    parts = store.minibatches(8, torch.Generator().manual_seed(0))
    next(parts)
    before, most = anonymous_memory(), 0
    for _ in parts:
        most = max(most, anonymous_memory() - before)
    assert most < 16e6


def readme_rollout() -> Rollout:
    """One response as palm-rlhf-pytorch's README has it: 2,048 tokens with their prompt, 20,000 in all."""
    found = made([512], [1536])
    tokens = torch.randint(0, 20_000, (1, 2048), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(1, 1536)
    return replace(
        found, generation=replace(found.generation, tokens=tokens, seeds=torch.tensor([1])),
        group=torch.tensor([0]), reference_logprob=zeros, values=zeros, advantages=zeros, returns=zeros,
    )  # fmt: skip


@pytest.mark.peers
def test_a_rollout_takes_less_than_one_percent_of_upstreams(tmp_path, monkeypatch):
    """Theirs from what `RLHFTrainer.train` keeps of a shorter rollout at its README's vocabulary."""
    import rlhf_kernels.stacks as stacks

    stacks.activate()
    ppo = pytest.importorskip("palm_rlhf_pytorch.ppo")
    from palm_rlhf_pytorch import PaLM, RewardModel

    kept = []

    def memory(*parts):
        kept.append(parts)
        return parts

    monkeypatch.setattr(ppo, "Memory", memory)
    palm = PaLM(num_tokens=20_000, dim=8, depth=1, dim_head=8, heads=1)
    prompts = torch.randint(1, 20_000, (1, 8))
    trainer = ppo.RLHFTrainer(
        palm=palm, reward_model=RewardModel(palm, num_binned_output=5), prompt_token_ids=prompts
    )
    trainer.train(num_episodes=1, max_timesteps=1, update_timesteps=10, max_seq_len=16)
    tokens = len(kept[0][0])
    # All but the reward and the value is of each token, so that it grows with their number.
    theirs = sum(part.numel() * part.element_size() for part in kept[0]) / tokens * 2048
    assert theirs > 156 * 2**20
    store = RolloutStore(tmp_path)
    store.append(readme_rollout())
    assert store.bytes < 0.01 * theirs
    assert store.bytes / theirs == pytest.approx(0.000255, rel=0.02)


def test_nothing_of_the_vocabularys_size_is_kept(tmp_path):
    store = RolloutStore(tmp_path)
    store.append(readme_rollout())
    columns = json.loads((tmp_path / FILE).read_bytes()[32:].split(b"}}")[0] + b"}}")["columns"]
    assert max(math.prod(shape) for _, _, shape in columns.values()) == 2048
    # A token: its id in 2 bytes; of a response 6 numbers of 4 bytes more.
    assert store.bytes < 2048 * 2 + 1536 * 6 * 4 + 2000
