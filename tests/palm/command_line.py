"""What the tests of `palm-rlhf` share: how a command is called and refused, and what runs begin with."""

import importlib.util
import json
import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from palm_rlhf.cli import main
from palm_rlhf.models.checkpoint import read_tensors
from palm_rlhf.trainers.log import read_metrics

SHAPE = ["--dim", "32", "--depth", "1", "--heads", "2", "--dim-head", "16"]
SFT = [*SHAPE, "--batch", "4", "--length", "8", "--warmup", "2", "--quiet"]
TASK = ["--task", "calculator", "--factors", "4", "4"]
PPO = ["--steps", "2", "--prompts", "4", "--minibatch", "4", "--quiet"]
TEXT = "so much depends upon a red wheel barrow glazed with rain water beside the white chickens\n" * 4
REWARD = "def letters(prompt, response):\n    return sum(c.isalpha() for c in response)\n"


def real_text():
    """Tiny Shakespeare where the data are, else the reference manual that comes with CPython."""
    data = Path(os.environ.get("PALM_RLHF_DATA", Path(__file__).parents[2] / "../shared/data"))
    file = data / "tinyshakespeare" / "input.txt"
    return file if file.exists() else Path(importlib.util.find_spec("pydoc_data.topics").origin)


def called(*words):
    """The exit code."""
    return main([str(word) for word in words])


def refused(capsys, *words):
    """The sentence that a wrong command line costs."""
    capsys.readouterr()
    assert called(*words) == 64
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("palm-rlhf: ")
    assert "Traceback" not in said.err
    return said.err.removeprefix("palm-rlhf: ").rstrip("\n")


def make_inputs(folder):
    """A text, prompts, a reward and pairs, and the run of an SFT on the text."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "prompts.txt").write_text("so much\nglazed with rain\n")
    (folder / "reward.py").write_text(REWARD)
    pairs = [{"prompt": f"{i}", "chosen": "yes" + "s" * i, "rejected": "no"} for i in range(10)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert called("sft", "--text", folder / "text.txt", "--steps", 3, "--out", folder / "text", *SFT) == 0
    return folder


def tokenizer_file(path, *special, vocabulary=300):
    """A byte-level BPE tokenizer with these special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))
    return path


def contents(folder):
    """All files and what is in them."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def without_clock(folder):
    """The metrics of a run, but for times."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def same_tensors(one, other):
    """Asserts that two files hold the same bits."""
    (mine, _), (theirs, _) = read_tensors(one), read_tensors(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
