"""palm-rlhf from the outside: the commands do what they say, stop when they are told to, and go on."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.cli import COMMANDS
from palm_rlhf.models.checkpoint import load_palm
from palm_rlhf.models.palm import PaLM
from palm_rlhf.rewards import RewardModel, save_reward_model
from palm_rlhf.trainers import loop
from palm_rlhf.trainers.log import read_metrics
from tests.palm.command_line import (
    PPO,
    SFT,
    TASK,
    called,
    contents,
    make_inputs,
    refused,
    same_tensors,
    tokenizer_file,
    without_clock,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs and finished runs. To be copied before they are changed."""
    folder = make_inputs(tmp_path_factory.mktemp("made"))
    assert called("sft", *TASK, "--steps", 6, "--out", folder / "sft", *SFT, "--length", 16) == 0
    return folder


def test_help_names_every_command_and_every_flag_is_explained(capsys):
    assert called("--help") == called() == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)
    plain = [[name] for name in COMMANDS if name != "train"]
    for words in (*plain, *(["train", name] for name in ALGORITHMS)):
        assert called(*words, "--help") == 0
        shown = capsys.readouterr().out
        # A flag without a docstring has a line that goes straight to its default.
        assert not re.findall(r"│ --[^│]*?  +\((?:default|required)", shown), words
    assert called("train", "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ALGORITHMS)


def test_help_has_each_example_on_a_line_and_no_stray_indentation(capsys):
    for words in (["evaluate"], ["generate"], ["rollouts"], ["train", "dpo"]):
        assert called(*words, "--help") == 0
        shown = capsys.readouterr().out
        head = shown[: shown.index(" options")]
        examples = [line for line in head.splitlines() if line.startswith("$ palm-rlhf ")]
        assert head.count("palm-rlhf ") == len(examples) + 1, "the first is the usage"
        assert len(examples) >= 2 or words[0] == "train"
        assert not [line for line in head.splitlines() if line.strip() and line.startswith(" ")]


def test_no_color_holds_for_help_on_a_terminal():
    ours, theirs = pty.openpty()
    environment = os.environ | {"NO_COLOR": "1", "TERM": "xterm"}
    command = [sys.executable, "-m", "palm_rlhf", "rollouts", "--help"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # what a terminal that was left says
            while more := os.read(ours, 1 << 16):
                said += more
    os.close(ours)
    assert b"usage: palm-rlhf rollouts" in said
    assert b"\x1b" not in said


def test_a_run_leaves_config_metrics_curve_checkpoint_and_model(made):
    folder = made / "text"
    assert json.loads((folder / "config.json").read_text())["steps"] == 3
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["validation_loss"] > 0
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert load_palm(folder / "model.safetensors").num_tokens == 256
    assert not list(folder.rglob(".*"))


def test_generate_repeats_with_a_seed_and_stops_where_the_texts_did(made, capsys):
    capsys.readouterr()
    words = (
        "generate",
        "--model",
        made / "sft",
        "--prompt",
        "2*2=",
        "3*4=",
        "--samples",
        2,
        "--json",
        "--seed",
        3,
    )
    assert called(*words, "--max-new-tokens", 300) == 0
    text = capsys.readouterr().out
    assert called(*words, "--max-new-tokens", 300) == 0
    assert capsys.readouterr().out == text
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["prompt"] for row in rows] == ["2*2=", "2*2=", "3*4=", "3*4="]
    stopped = [row for row in rows if row["stopped"]]
    assert stopped
    assert all("\n" not in row["response"] and row["logprob"] < 0 for row in stopped)
    assert [row["seed"] for row in rows] == [3, 4, 5, 6]
    alone = ("generate", "--model", made / "sft", "--prompt", "3*4=", "--seed", 6, "--json")
    assert called(*alone, "--max-new-tokens", 300) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["response"] == rows[3]["response"], "its seed reproduces it alone"


def test_best_of_takes_the_response_with_the_highest_reward(made, capsys):
    capsys.readouterr()
    words = (
        "generate",
        "--model",
        made / "text",
        "--prompt",
        "so",
        "--json",
        "--seed",
        1,
        "--max-new-tokens",
        12,
    )
    assert called(*words, "--samples", 6) == 0
    responses = [json.loads(line)["response"] for line in capsys.readouterr().out.splitlines()]
    assert called(*words, "--best-of", 6, "--reward", f"{made / 'reward.py'}:letters") == 0
    best = json.loads(capsys.readouterr().out)
    letters = [sum(c.isalpha() for c in text) for text in responses]
    assert best["reward"] == max(letters) > 0
    assert best["response"] == responses[letters.index(max(letters))]


@pytest.mark.parametrize("lora", ["--lora", "--no-lora"])
def test_ppo_learns_from_the_task_and_says_what_it_brought(made, tmp_path, capsys, lora):
    before = contents(made)
    assert called("train", "ppo", *TASK, "--model", made / "sft", "--out", tmp_path / "ppo", lora, *PPO) == 0
    said = capsys.readouterr().out
    assert re.search(r"accuracy on 3 held-out problems: [\d.]+% before, [\d.]+% after", said)
    assert f"curve  {tmp_path / 'ppo' / 'curve.png'}" in said
    result = json.loads((tmp_path / "ppo" / "result.json").read_text())
    assert (result["steps"], result["held_out"]) == (2, 3)
    assert contents(made) == before, "what it starts from stays as it is"
    model = load_palm(tmp_path / "ppo" / "model.safetensors")
    assert not len(model.finetune_modules)
    start = load_palm(made / "sft" / "model.safetensors")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters()))
    assert called("generate", "--model", tmp_path / "ppo", "--prompt", "2*2=") == 0


def test_ppo_resumes_bit_for_bit_and_may_grow(made, tmp_path):
    # Not annealed: the number of steps would be in the learning rate.
    words = ["train", "ppo", *TASK, "--model", made / "sft", *PPO, "--no-anneal", "--steps"]
    assert called(*words, 3, "--out", tmp_path / "straight") == 0
    assert called(*words, 1, "--out", tmp_path / "grown") == 0
    assert called(*words, 3, "--out", tmp_path / "grown") == 0
    same_tensors(tmp_path / "straight" / "model.safetensors", tmp_path / "grown" / "model.safetensors")
    assert without_clock(tmp_path / "straight") == without_clock(tmp_path / "grown")


def test_ppo_learns_from_prompts_and_a_function_of_ones_own(made, tmp_path):
    words = [
        "--prompts-file",
        made / "prompts.txt",
        "--reward",
        f"{made / 'reward.py'}:letters",
        "--max-new-tokens",
        6,
    ]
    assert called("train", "ppo", "--model", made / "text", "--out", tmp_path / "ppo", *words, *PPO) == 0
    assert all(row["reward"] >= 0 for row in read_metrics(tmp_path / "ppo" / "metrics.jsonl"))


def test_a_reward_model_is_trained_and_rewards(made, tmp_path, capsys):
    words = ["--model", made / "text", "--pairs", made / "pairs.jsonl", "--batch", 3, "--quiet"]
    assert called("reward", *words, "--out", tmp_path / "reward") == 0
    assert "on 1 held-out examples: loss" in capsys.readouterr().out
    ppo = [
        "--model",
        made / "text",
        "--prompts-file",
        made / "prompts.txt",
        "--reward-model",
        tmp_path / "reward",
    ]
    assert called("train", "ppo", *ppo, "--max-new-tokens", 4, "--out", tmp_path / "ppo", *PPO) == 0
    best = ["--best-of", 3, "--reward-model", tmp_path / "reward", "--max-new-tokens", 4]
    assert called("generate", "--model", tmp_path / "ppo", "--prompt", "so", *best) == 0
    # A run that is finished is drawn again, not trained again; more epochs go on.
    rows = read_metrics(tmp_path / "reward" / "metrics.jsonl")
    assert called("reward", *words, "--out", tmp_path / "reward", "--epochs", 2) == 0
    assert len(read_metrics(tmp_path / "reward" / "metrics.jsonl")) == 2 * len(rows)


def test_a_tokenizer_file_goes_with_the_model(made, tmp_path, capsys):
    file = tokenizer_file(tmp_path / "own.json", "<pad>", "</s>", vocabulary=290)
    words = ["--text", made / "text.txt", "--tokenizer", file, "--steps", 3, *SFT]
    assert called("sft", *words, "--out", tmp_path / "bpe") == 0
    file.unlink()
    assert load_palm(tmp_path / "bpe" / "model.safetensors").num_tokens == 290
    assert called("generate", "--model", tmp_path / "bpe", "--prompt", "so much") == 0
    further = ["sft", "--text", made / "text.txt", "--model", tmp_path / "bpe", "--steps", 2, "--quiet"]
    assert called(*further, "--length", 8, "--out", tmp_path / "more") == 0
    assert "so much" in capsys.readouterr().out
    assert (tmp_path / "more" / "tokenizer.json").exists()
    # A model in other tokens does not judge it.
    reward = RewardModel(PaLM(dim=32, num_tokens=300, depth=1, heads=2, dim_head=16))
    save_reward_model(tmp_path / "reward" / "model.safetensors", reward, tokenizer="bytes", stop=4)
    words = ["--prompt", "so", "--best-of", 2, "--reward-model", tmp_path / "reward"]
    assert "reads other tokens (bytes)" in refused(capsys, "generate", "--model", tmp_path / "bpe", *words)


# Stopping and resuming


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(made, tmp_path):
    """A real SIGINT to a process of its own; the resumed run ends in the bits of one that was not stopped."""
    words = ["sft", "--text", made / "text.txt", "--steps", 120, "--save-every", 1000, *SFT, "--out"]
    line = [sys.executable, "-m", "palm_rlhf", *map(str, words), str(tmp_path / "run")]
    # As many threads as here: the bits of a sum depend on them.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, env=env, cwd=Path(__file__).parents[2]
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 2):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name[5:])
    assert 2 <= step < 120
    assert (
        f"stopped after step {step}; the checkpoint is {checkpoint}. Resume with: palm-rlhf sft --text"
        in said
    )
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert called(*words, tmp_path / "run") == called(*words, tmp_path / "straight") == 0
    same_tensors(tmp_path / "run" / "model.safetensors", tmp_path / "straight" / "model.safetensors")
    assert without_clock(tmp_path / "run") == without_clock(tmp_path / "straight")


def test_a_run_goes_on_with_the_same_flags_only(made, tmp_path, capsys):
    shutil.copytree(made / "text", tmp_path / "run")
    words = ["sft", "--text", made / "text.txt", *SFT, "--out", tmp_path / "run", "--steps"]
    before = contents(tmp_path)
    assert "was begun with lr 0.001, and is to go on with 0.5" in refused(capsys, *words, 3, "--lr", 0.5)
    assert "was begun with 3 steps, and is to go on with 2" in refused(capsys, *words, 2)
    assert "begun with command sft" in refused(
        capsys, "train", "ppo", *TASK, "--model", made / "sft", "--out", tmp_path / "run"
    )
    assert contents(tmp_path) == before
    assert called(*words, 5) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 5


def test_a_run_does_not_go_on_with_other_contents_of_its_files(made, tmp_path, capsys):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_bytes((made / "text.txt").read_bytes())
    words = ["sft", "--text", text, *SFT, "--out", run, "--steps"]
    assert called(*words, 1) == 0
    text.write_text("other contents of the same file, " * 9)
    said = refused(capsys, *words, 2)
    assert said.startswith(f"--text {text} has changed since the run in {run} was begun with it")
    text.write_bytes((made / "text.txt").read_bytes())
    # A run of before, which does not say what it held, goes on.
    config = json.loads((run / "config.json").read_text())
    del config["inputs"]
    (run / "config.json").write_text(json.dumps(config))
    assert called(*words, 2) == 0


def test_a_second_process_does_not_train_in_the_folder_of_the_first(made, tmp_path, monkeypatch, capsys):
    pytest.importorskip("fcntl", reason="there are no locks of files here")
    words = ["sft", "--text", made / "text.txt", *SFT, "--steps", 2, "--out", tmp_path / "run"]
    trains, said = loop.run, []

    def while_it_trains(*arguments, **options):
        monkeypatch.setattr(loop, "run", trains)
        said.append(refused(capsys, *words))
        return trains(*arguments, **options)

    monkeypatch.setattr(loop, "run", while_it_trains)
    assert called(*words) == 0
    where = tmp_path / "run"
    assert said == [f"another process trains in {where}. Wait for it, stop it, or choose another --out."]
    assert called(*words) == 0  # one after the other


def test_a_damaged_checkpoint_costs_one_sentence(made, tmp_path, capsys):
    shutil.copytree(made / "text", tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-00000003"
    (last / "training.pt").write_bytes(b"PK rubbish")
    said = refused(capsys, "sft", "--text", made / "text.txt", *SFT, "--out", tmp_path / "run", "--steps", 4)
    assert said.startswith(f"the checkpoint {last} cannot be resumed: training.pt cannot be read")
    assert said.endswith("Remove it to start over, or choose another output folder.")


def test_an_unfinished_run_is_no_model(made, tmp_path, capsys):
    shutil.copytree(made / "text", tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    said = refused(capsys, "generate", "--model", tmp_path / "run", "--prompt", "so")
    assert "its training is not finished" in said
