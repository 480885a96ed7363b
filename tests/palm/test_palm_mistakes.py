"""palm-rlhf and mistakes: each costs one sentence and exit code 64, and nothing else."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from palm_rlhf.models.checkpoint import save_palm
from palm_rlhf.models.palm import PaLM
from palm_rlhf.rewards import RewardModel, save_reward_model
from palm_rlhf.trainers.log import read_metrics
from tests.palm.command_line import PPO, SFT, TASK, called, contents, make_inputs, refused, tokenizer_file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs and finished runs. To be copied before they are changed."""
    folder = make_inputs(tmp_path_factory.mktemp("made"))
    assert called("sft", *TASK, "--steps", 6, "--out", folder / "sft", *SFT, "--length", 16) == 0
    return folder


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["stf"], "there is no command 'stf'. Did you mean 'sft'?"),
        (["train", "pppo"], "there is no algorithm 'pppo'. Did you mean 'ppo'?"),
        (["sft"], "--out must be given. See palm-rlhf sft --help."),
        (["train", "ppo"], "--model and --out must be given"),
        (
            ["sft", "--out", "x", "--stesp", "3"],
            "Unrecognized options: --stesp, 3. See palm-rlhf sft --help.",
        ),
        (["sft", "--out", "x", "--steps", "many"], "--steps"),
        (["sft", "--out", "x", "--steps", "0", *TASK], "steps must be at least 1, got 0"),
        (["sft", "--out", "x", "--task", "chess"], "invalid choice 'chess'"),
        (["sft", "--out", "x"], "give one text to learn from"),
        (["sft", "--out", "x", *TASK, "--text", "y"], "give one text to learn from"),
        (["sft", "--out", "x", *TASK, "--lines"], "--lines belongs to --text"),
        (["sft", "--out", "x", *TASK, "--length", "3"], "more than the length 3"),
        (["sft", "--out", "x", *TASK, "--dim-head", "15"], "dim_head must be even"),
        (["sft", "--out", "x", *TASK, "--device", "nonsense"], "the device 'nonsense' cannot be used"),
        (["sft", "--out", "x", *TASK, "--save-every", "0"], "--save-every must be at least 1"),
        (
            ["train", "grpo", "--model", "x", "--out", "x", "--warmup", "-1"],
            "warmup must be at least 0, got -1",
        ),
        (
            ["train", "ipo", "--model", "x", "--out", "x", "--pairs", "x", "--tau", "0"],
            "tau must be above 0, got 0",
        ),
        (["generate", "--model", "x", "--prompt", ""], "give a prompt that is not empty"),
        (
            ["generate", "--model", "x", "--prompt", "a", "--max-new-tokens", "0"],
            "--max-new-tokens must be at least 1",
        ),
        (["generate", "--model", "nowhere", "--prompt", "a"], "there is no checkpoint nowhere"),
        (["rollouts", "--run", "nowhere"], "--run nowhere: there is no such folder"),
    ],
)
def test_a_wrong_command_line_costs_one_sentence_and_nothing_else(
    tmp_path, monkeypatch, capsys, words, reason
):
    monkeypatch.chdir(tmp_path)
    assert reason in refused(capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b"\x7fELF\0\0\1", "is no text file: byte 4 is NUL"),
        (b"na\xefve " * 99, "is no UTF-8 text: byte 2 is 0xef"),
        (b"short", "has 5 tokens, fewer than a window of 9"),
    ],
)
def test_a_text_file_that_does_not_serve(tmp_path, capsys, data, reason):
    if data is not None:
        (tmp_path / "text.txt").write_bytes(data)
    said = refused(capsys, "sft", "--text", tmp_path / "text.txt", "--out", tmp_path / "run", *SFT)
    assert str(tmp_path / "text.txt") in said
    assert reason in said
    assert not (tmp_path / "run").exists()


def foreign(path, kind):
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        save_palm(path, PaLM(dim=32, num_tokens=256, depth=1, heads=2, dim_head=16), tokenizer="bytes")
        path.write_bytes(path.read_bytes()[:999])
    elif kind == "pickle":  # of what could run code
        torch.save({"weights": Path("x")}, path)
    elif kind == "other":
        torch.save({"conv.weight": torch.zeros(3)}, path)
    elif kind == "reward":
        save_reward_model(path, RewardModel(PaLM(dim=32, num_tokens=256, depth=1, heads=2, dim_head=16)))
    return path


@pytest.mark.parametrize("command", ["generate", "sft", "train"])
@pytest.mark.parametrize("kind", ["text", "empty", "cut", "pickle", "other", "reward", "gone"])
def test_a_checkpoint_that_is_none(tmp_path, capsys, kind, command):
    file = foreign(tmp_path / "weights", kind)
    out = ["--out", tmp_path / "run"]
    words = {"generate": ["--prompt", "a"], "sft": [*TASK, *out], "train": [*TASK, *out]}[command]
    said = refused(capsys, *(["train", "ppo"] if command == "train" else [command]), "--model", file, *words)
    assert str(file) in said
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_word_on_its_tokens_needs_a_tokenizer_that_fits(made, tmp_path, capsys):
    torch.manual_seed(0)
    save_palm(tmp_path / "bare", PaLM(dim=32, num_tokens=100, depth=1, heads=2, dim_head=16))
    words = ["generate", "--model", tmp_path / "bare", "--prompt", "a"]
    assert "does not say what its tokens are. Give --tokenizer" in refused(capsys, *words)
    assert "has 256 tokens and the model 100: they do not fit" in refused(
        capsys, *words, "--tokenizer", "bytes"
    )
    assert "no Hugging Face tokenizer.json" in refused(capsys, *words, "--tokenizer", made / "text.txt")
    file = tokenizer_file(tmp_path / "own.json", "<pad>", "</s>", vocabulary=290)
    words = ["sft", "--text", made / "text.txt", "--model", made / "text", "--tokenizer", file]
    assert "has 290 tokens and the model 256" in refused(capsys, *words, "--out", tmp_path / "run")
    assert "is of a new model" in refused(
        capsys, "sft", *TASK, "--model", made / "sft", "--out", tmp_path / "run", "--dim", 64
    )
    assert not (tmp_path / "run").exists()


def test_a_prompt_longer_than_the_model_allows(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(PaLM, "max_length", 12)
    words = ["generate", "--model", made / "text", "--prompt", "so much depends", "--max-new-tokens", 5]
    assert "a prompt of 15 tokens and 5 new ones exceed the model's 12" in refused(capsys, *words)
    words = ["--model", made / "text", "--prompts-file", made / "prompts.txt", "--max-new-tokens", 5]
    words += ["--reward", f"{made / 'reward.py'}:letters", "--out", tmp_path / "run"]
    assert "make 21 tokens, and the model allows 12" in refused(capsys, "train", "ppo", *words, *PPO)
    assert not (tmp_path / "run").exists()


REWARDS = """
import math
calls = 0
def late(prompt, response):
    global calls
    calls += 1
    if calls > 8:
        raise RuntimeError("out of luck")
    return 1.0
def nan(prompt, response):
    return math.nan
def text(prompt, response):
    return "good"
def one(prompt):
    return 1.0
number = 3
"""


def test_a_reward_that_raises_leaves_the_last_checkpoint(made, tmp_path, capsys):
    (tmp_path / "own.py").write_text(REWARDS)
    words = [
        "--prompts-file",
        made / "prompts.txt",
        "--reward",
        f"{tmp_path / 'own.py'}:late",
        "--max-new-tokens",
        4,
    ]
    words += ["--model", made / "text", "--out", tmp_path / "run", *PPO, "--steps", 5, "--save-every", 1]
    said = refused(capsys, "train", "ppo", *words)
    assert said.startswith("the reward late() raised RuntimeError: out of luck, for the prompt ")
    last = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert said.endswith(f"; the last checkpoint is {last}")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not list((tmp_path / "run").rglob(".*"))
    # Mended, the run goes on from there.
    (tmp_path / "own.py").write_text("def late(prompt, response):\n    return 1.0\n")
    assert called("train", "ppo", *words) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 5


@pytest.mark.parametrize(
    ("reward", "reason", "early"),
    [
        ("own.py:nan", "the reward nan() gave nan, for the prompt", False),
        ("own.py:text", "the reward text() gave 'good', for the prompt", False),
        ("own.py:one", "one() must take (prompt, response)", True),
        ("own.py:number", "has no function number()", True),
        ("own.py:absent", "has no function absent()", True),
        ("own.py", "is given as FILE.py:function", True),
        ("gone.py:nan", "there is no file", True),
        ("broken.py:nan", "cannot be imported: SyntaxError", True),
    ],
)
def test_a_reward_that_is_none(made, tmp_path, capsys, monkeypatch, reward, reason, early):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(REWARDS)
    Path("broken.py").write_text("def nan(:\n")
    words = [
        "--prompts-file",
        made / "prompts.txt",
        "--reward",
        reward,
        "--max-new-tokens",
        4,
        "--out",
        "run",
    ]
    assert reason in refused(capsys, "train", "ppo", "--model", made / "text", *words, *PPO)
    # What is wrong beforehand leaves nothing; what fails in the first step no model and no checkpoint.
    assert Path("run").exists() != early
    assert not list(Path().rglob("*.safetensors"))


def test_rewards_and_prompts_are_given_once(made, tmp_path, capsys):
    words = ["train", "ppo", "--model", made / "text", "--out", tmp_path / "run"]
    prompts = ["--prompts-file", made / "prompts.txt"]
    assert "give one kind of prompts" in refused(capsys, *words)
    assert "give one kind of prompts" in refused(capsys, *words, *TASK, *prompts)
    assert "there is no reward" in refused(capsys, *words, *prompts)
    assert "exclude each other" in refused(
        capsys, *words, *prompts, "--reward", "a.py:b", "--reward-model", "c"
    )
    assert "holds a PaLM, expected a RewardModel" in refused(
        capsys, *words, *prompts, "--reward-model", made / "text"
    )
    assert not (tmp_path / "run").exists()


def test_options_of_generation_that_cannot_be(made, capsys):
    words = ["generate", "--model", made / "text", "--prompt", "so"]
    assert "--stop must be one token, and 'END' has 3" in refused(capsys, *words, "--stop", "END")
    assert "exclude each other" in refused(capsys, *words, "--samples", 2, "--best-of", 2)
    assert "there is no reward" in refused(capsys, *words, "--best-of", 2)
    for flag, value in (("--temperature", -1), ("--top-p", 7), ("--top-k", 0), ("--samples", 0)):
        assert flag[2:].replace("-", "_") in refused(capsys, *words, flag, value)


def test_a_terminal_gets_no_commands_from_texts(made, tmp_path, capsys):
    (tmp_path / "own.py").write_text("def none(prompt, response):\n    raise ValueError(prompt)\n")
    text = "so\x1b[2J\x9b31m\r\t\x7f much\n"
    words = ["generate", "--model", made / "text", "--prompt", text, "--max-new-tokens", 1]
    capsys.readouterr()
    assert called(*words) == 0
    assert capsys.readouterr().out.startswith("so\\x1b[2J\\x9b31m\\x0d\t\\x7f much\n")
    assert called(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == text
    said = refused(capsys, *words, "--best-of", 2, "--reward", f"{tmp_path / 'own.py'}:none")
    assert "raised ValueError: so\\x1b[2J\\x9b31m" in said
    assert not set(said) & set("\x1b\x9b\r\x7f")


def test_a_file_that_cannot_be_written_is_named_as_it_was_given(made, tmp_path, capsys):
    words = ["sample", "--model", made / "text", "--prompts-file", made / "prompts.txt", "--quiet"]
    out = tmp_path / "samples.jsonl"
    (tmp_path / "samples.jsonl.config.json").mkdir()
    assert refused(capsys, *words, "--out", out) == f"{out}.config.json: Is a directory"


def test_mistakes_are_told_without_box_characters_as_well(capsys, monkeypatch):
    """The parser draws its boxes by what standard output can show."""
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert called("sft", "--out", "x", "--stesp", "3") == 64
    assert (
        capsys.readouterr().err == "palm-rlhf: Unrecognized options: --stesp, 3. See palm-rlhf sft --help.\n"
    )


def test_a_package_that_is_missing_is_named_with_the_remedy(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert "tyro is not installed, which this command needs: pip install" in refused(
        capsys, "sft", "--out", "x"
    )


def test_a_folder_that_is_no_run_is_left_alone(made, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    before = contents(tmp_path)
    words = ["sft", "--text", made / "text.txt", *SFT, "--out"]
    assert "is not empty and no run of palm-rlhf" in refused(capsys, *words, tmp_path)
    assert "is a file. Choose a folder" in refused(capsys, *words, tmp_path / "file")
    (tmp_path / "config.json").write_text("{}")
    assert "is not empty and no run of palm-rlhf" in refused(capsys, *words, tmp_path)
    (tmp_path / "config.json").unlink()
    assert contents(tmp_path) == before


def test_pairs_that_do_not_serve(made, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    for text, reason in (
        ("", "is empty"),
        ("{", "line 1: no JSON"),
        ('{"chosen": "a"}\n', '"rejected" is missing'),
        ('{"chosen": "a", "rejected": "b"}\n', "a share of 0.1 held out (--held-back) of 1 examples"),
    ):
        file.write_text(text)
        said = refused(capsys, "reward", "--model", made / "text", "--pairs", file, "--out", tmp_path / "run")
        assert reason in said
    assert not (tmp_path / "run").exists()
