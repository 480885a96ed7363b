"""The numbers that a response's seed gives."""

import torch

from palm_rlhf.seeds import _STEP, _mixed, uniforms


def test_seeds_give_independent_uniform_numbers():
    """Each seed's numbers, and those of neighbouring seeds, by chi-squared and correlation (4 sigma)."""
    steps_on = 7 + _STEP * torch.arange(1, 4)
    seeds = torch.cat(
        [torch.arange(1000), 2**32 * torch.arange(1, 1001), 2**63 - 1 - torch.arange(1000), steps_on]
    )
    drawn = torch.stack([uniforms(seeds, step) for step in range(64)], 1)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, 100, 0, 1)
    expected = drawn.numel() / 100
    assert ((counts - expected).square() / expected).sum() < 99 + 4 * (2 * 99) ** 0.5
    assert drawn.unique().numel() == drawn.numel(), "no seed walks another's sequence"
    centred = drawn - 0.5
    pairs = {"steps": (centred[:, :-1], centred[:, 1:]), "seeds": (centred[:-1], centred[1:])}
    for name, (first, second) in pairs.items():
        correlation = 12 * (first * second).mean()
        assert abs(correlation) < 4 / first.numel() ** 0.5, name


def test_splitmix_is_the_published_one():
    """The first numbers of seed 1234567 as published with the reference code, from an unmixed state."""
    state = torch.tensor([1234567]) + _STEP * torch.arange(1, 4)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert (_mixed(state).tolist()) == [x if x < 2**63 else x - 2**64 for x in expected]
