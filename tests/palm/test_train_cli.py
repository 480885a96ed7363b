"""`palm-rlhf train` with other rows of the table than PPO."""

import json

import pytest

from palm_rlhf.trainers.log import read_metrics
from tests.palm.command_line import SFT, TASK, called, make_inputs, refused, same_tensors, without_clock

GRPO = ["--steps", "2", "--prompts", "2", "--samples", "3", "--minibatch", "3", "--quiet"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs and an SFT run. To be left as they are."""
    folder = make_inputs(tmp_path_factory.mktemp("made"))
    assert called("sft", *TASK, "--steps", 6, "--out", folder / "sft", *SFT, "--length", 16) == 0
    return folder


def test_grpo_samples_groups_and_resumes_bit_for_bit(made, tmp_path):
    words = ["train", "grpo", *TASK, "--model", made / "sft", "--kl-target", 0.1, "--no-anneal", *GRPO]
    one, other = tmp_path / "one", tmp_path / "other"
    assert called(*words, "--out", one, "--steps", 3) == 0
    assert called(*words, "--out", other, "--save-every", 1) == 0
    assert called(*words, "--out", other, "--steps", 3) == 0
    same_tensors(one / "model.safetensors", other / "model.safetensors")
    assert without_clock(one) == without_clock(other)
    rows = read_metrics(one / "metrics.jsonl")
    assert rows[0]["kl_coef"] == 0.04
    assert rows[0]["kl_coef"] != rows[2]["kl_coef"]
    assert json.loads((one / "config.json").read_text())["average"] == "sequence-mean"


def test_a_row_brings_its_own_sizes_and_says_what_it_needs(made, tmp_path, capsys):
    words = ["--model", made / "sft", "--out", tmp_path / "run", *TASK, "--steps", 1, "--quiet"]
    said = refused(capsys, "train", "rloo", *words, "--samples", 1)
    assert said.startswith("rloo compares responses to the same prompt and needs at least 2 of them")
    assert called("train", "reinforce++-baseline", *words, "--prompts", 2) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["samples"] == 8
