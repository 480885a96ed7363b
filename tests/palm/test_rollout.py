"""Batches on their way to the update: rows stay together, and nothing but padding is cut."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.generation import Generation
from palm_rlhf.rollout import Rollout


def made(prompts: list[int], responses: list[int], seed: int = 0, slack: tuple[int, int] = (0, 0)) -> Rollout:
    """Random numbers for prompts and responses of these lengths, with this many columns of padding more."""
    generator = torch.Generator().manual_seed(seed)
    rows, width, steps = len(prompts), max(prompts) + slack[0], max(responses) + slack[1]
    columns = torch.arange(width + steps)
    mask = torch.stack([(columns >= width - p) & (columns < width + r) for p, r in zip(prompts, responses)])
    drawn = torch.randn(6, rows, steps, generator=generator)
    tokens = torch.randint(1, 20, mask.shape, generator=generator).masked_fill(~mask, 0)
    stopped = torch.randint(2, (rows,), generator=generator).bool()
    generation = Generation(tokens, mask, width, -drawn[0].abs(), -drawn[1].abs(), stopped)
    score = torch.randn(rows, generator=generator)
    return Rollout(generation, 0.7, score, -drawn[2].abs(), drawn[3], drawn[4], drawn[5])


def tensors(rollout: Rollout) -> dict[str, torch.Tensor]:
    parts = (rollout, rollout.generation)
    found = {f.name: getattr(part, f.name) for part in parts for f in fields(part)}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def real(rollout: Rollout) -> list[dict]:
    """What each row holds, without padding."""
    rows = []
    for row in range(len(rollout)):
        g, mask = rollout.generation, rollout.mask[row]
        by_token = ("reference_logprob", "values", "advantages", "returns", "logprob")
        rows.append(
            {name: getattr(rollout, name)[row][mask].tolist() for name in by_token}
            | {"prompt": g.prompt(row), "response": g.response(row), "stopped": bool(g.stopped[row])}
            | {"score": float(rollout.score[row]), "log_mass": g.log_mass[row][mask].tolist()}
        )
    return rows


LENGTHS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=7)


@given(LENGTHS, st.integers(0, 2), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_trimming_cuts_padding_and_nothing_else(lengths, before, after):
    prompts, responses = zip(*lengths)
    rollout = made(list(prompts), list(responses), slack=(before, after))
    cut = rollout.trimmed()
    assert real(cut) == real(rollout)
    assert cut.generation.prompt_width == max(prompts)
    assert cut.generation.tokens.shape[1] == max(prompts) + max(responses)
    assert {
        x.shape[1] for name, x in tensors(cut).items() if x.dim() == 2 and name not in ("tokens", "mask")
    } == {max(responses)}


@given(LENGTHS, st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_micro_batches_are_all_rows_in_order(lengths, size):
    rollout = made(*map(list, zip(*lengths)))
    parts = list(rollout.micro_batches(size))
    assert [row for part in parts for row in real(part)] == real(rollout)
    assert all(len(part) <= size for part in parts)
    assert [real(part) for part in rollout.micro_batches(None)] == [real(rollout)]


@given(LENGTHS, st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_minibatches_are_all_rows_once(lengths, size, seed):
    rollout = made(*map(list, zip(*lengths)))
    parts = list(rollout.minibatches(size, torch.Generator().manual_seed(seed)))
    found = [row for part in parts for row in real(part)]
    key = str
    assert sorted(found, key=key) == sorted(real(rollout), key=key)
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)


def test_the_order_of_minibatches_is_fresh_and_the_generators():
    rollout = made([2] * 16, [3] * 16)
    generator = torch.Generator().manual_seed(0)
    first, second = (
        [row for part in rollout.minibatches(4, generator) for row in real(part)] for _ in range(2)
    )
    assert first != second
    again = [row for part in rollout.minibatches(4, torch.Generator().manual_seed(0)) for row in real(part)]
    assert again == first


@pytest.mark.parametrize(
    "index", [torch.tensor([2, 0]), slice(1, 3), torch.tensor([True, False, True])], ids=str
)
def test_rows_of_everything(index):
    rollout = made([2, 3, 1], [4, 1, 2])
    some, every = tensors(rollout.rows(index)), tensors(rollout)
    assert some.keys() == every.keys()
    for name, value in some.items():
        assert torch.equal(value, every[name][index]), name
    assert rollout.rows(index).temperature == 0.7


def test_what_is_not_needed_stays_none():
    rollout = replace(
        made([2, 1], [3, 2]), reference_logprob=None, values=None, advantages=None, returns=None
    )
    for other in (
        rollout.rows(slice(1)),
        rollout.trimmed(),
        *rollout.micro_batches(1),
        *rollout.minibatches(1),
    ):
        assert other.reference_logprob is other.values is other.advantages is other.returns is None
