"""Training that lasts: killed at any moment it is the run that was not; parts and precision change little."""

import pytest
import torch

from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.algorithms.table import ALGORITHMS
from tests.palm.command_line import same_tensors, without_clock
from tests.palm.processes import (
    STEPS,
    killed_and_resumed,
    offline,
    online,
    rewarding,
    straight,
    supervised,
)

# Rounding in float32 would hide a difference of 1e-6; not every kernel knows float64.
quiet = pytest.mark.filterwarnings("ignore::rlhf_kernels.runtime.dispatch.FallbackWarning")
TRAINERS = {
    "sft": supervised,
    "reward": rewarding,
    "ppo": lambda *given, **more: online("ppo", {}, *given, **more),
    "dpo": lambda *given, **more: offline("dpo", *given, **more),
}


def stepped(trainer, steps=1):
    """The figures of some steps without what the clock says, and the weights after them."""
    rows = [trainer.step(index) for index in range(steps)]
    figures = [{name: x for name, x in row.items() if "second" not in name} for row in rows]
    return figures, torch.nn.ModuleDict(trainer.modules()).state_dict()


def check_equal(one, other):
    """To 1e-6, figures and weights."""
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)
    for name, tensor in one[1].items():
        torch.testing.assert_close(tensor, other[1][name], rtol=1e-6, atol=1e-6, msg=name)


@quiet
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_of_a_policy_is_the_same_in_parts(name):
    options = {"auxiliary_every": 1, "auxiliary_epochs": 1} if ALGORITHMS[name].auxiliary else {}
    sizes = {"prompts": 2, "samples": 3, "minibatch": 6, "epochs": 1, "steps": 1}
    part = 3 if ALGORITHMS[name].groups else 1
    whole, parts = (
        stepped(online(name, options, torch.float64, micro_batch=m, **sizes)) for m in (None, part)
    )
    assert whole[0][0]["policy_loss"]
    check_equal(parts, whole)


@quiet
@pytest.mark.parametrize("name", PAIR_ALGORITHMS)
def test_an_update_from_pairs_is_the_same_in_parts(name):
    whole, parts = (stepped(offline(name, torch.float64, micro_batch=m), 2) for m in (None, 1))
    check_equal(parts, whole)


@quiet
def test_updates_from_texts_and_of_rewards_are_the_same_in_parts():
    sizes = ({"batch": 6}, {"batch": 1, "accumulate": 6})
    whole, parts = (stepped(supervised(torch.float64, **size), 2) for size in sizes)
    check_equal(parts, whole)
    whole, parts = (stepped(rewarding(torch.float64, micro_batch=m), 2) for m in (None, 1))
    check_equal(parts, whole)


@pytest.mark.parametrize("kind", TRAINERS)
def test_in_bf16_it_learns_nearly_the_same_with_weights_in_float32(kind):
    # Of what is sampled after an update a token may be another.
    steps = 1 if kind == "ppo" else 3
    full, _ = stepped(TRAINERS[kind](), steps)
    trainer = TRAINERS[kind](precision="bf16")
    lower, weights = stepped(trainer, steps)
    loss = "policy_loss" if kind == "ppo" else "loss"
    assert [row[loss] for row in lower] == pytest.approx([row[loss] for row in full], rel=0.02, abs=2e-3)
    assert lower[0][loss] != full[0][loss]
    held = [x for o in trainer.optimizers().values() for state in o.state.values() for x in state.values()]
    assert {x.dtype for x in (*weights.values(), *held)} == {torch.float32}


@pytest.mark.parametrize("name", ["ppo", "score-centering"])
def test_in_bf16_the_ratio_is_exactly_1_when_scored_in_the_same_minibatches(name):
    trainer = online(name, {}, precision="bf16")
    rollout = trainer.estimated(trainer.rollout())
    for part in rollout.minibatches(4, torch.Generator().manual_seed(0)):
        one, other = (trainer.outputs(part).logprob for _ in range(2))
        assert one.dtype == torch.float32
        assert torch.equal((one - other).exp(), torch.ones_like(one))
        # The sampler rounds as the learner does.
        assert (one - part.logprob)[part.mask].abs().max() < 0.05


def test_a_precision_that_the_launch_does_not_ask_for_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    supervised(precision="bf16")
    with pytest.raises(ValueError, match="asks for mixed precision bf16, and the run for float32"):
        supervised()


@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_a_run_killed_again_and_again_is_the_run_that_was_not_bit_for_bit(tmp_path, kind):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    seconds = straight(kind, whole)
    assert killed_and_resumed(kind, killed, seed=3, changes=55, seconds=seconds / 2) >= 4
    same_tensors(whole / "model.safetensors", killed / "model.safetensors")
    rows = without_clock(killed)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == without_clock(whole)
    # Nothing is left of what was under way.
    assert not list(killed.rglob(".*"))
    assert len(list((killed / "checkpoints").iterdir())) == 2
