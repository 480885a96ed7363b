"""Training that lasts: killed at any moment and resumed, a run is the run that nothing happened to."""

import pytest

from tests.palm.command_line import same_tensors, without_clock
from tests.palm.processes import STEPS, killed_and_resumed, straight


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
