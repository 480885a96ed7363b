"""The commands of docs/pipeline.md, run as they stand there, at a size for tests."""

import json
import os
import re
import subprocess
from pathlib import Path

from palm_rlhf.cli import main
from tests.palm.command_line import SHAPE, TEXT

DOCS = Path(__file__).parents[2] / "docs" / "pipeline.md"
SMALLER = {
    "sft": [*SHAPE, "--steps", "3", "--batch", "4", "--quiet"],
    "sample": ["--limit", "8", "--samples", "3", "--max-new-tokens", "6", "--quiet"],
    "score": ["--quiet"],
    "pairs": ["--test", "2"],
    "train": ["--batch", "4", "--lr", "0.05", "--quiet"],
    "reward": ["--batch", "4", "--held-back", "0.4", "--quiet"],
    "evaluate": ["--limit", "3", "--max-new-tokens", "6", "--quiet"],
}
# Instead of running a command, keeps what the shell makes of its line.
RECORD = 'palm-rlhf() { printf "%s\\n" "$@" >> commands; printf "\\n" >> commands; }\n'


def commands(folder):
    """What the shell runs, in order, after everything else in the blocks was done."""
    script = RECORD + "".join(re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL))
    shell = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(shell, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [words.split("\n") for words in (folder / "commands").read_text().strip("\n").split("\n\n")]


def test_the_chain_runs_as_it_is_written(tmp_path, monkeypatch, capsys):
    words = TEXT.split()
    lines = [" ".join(words[i % 50 : i % 50 + 5]).capitalize() for i in range(600)]
    (tmp_path / "book.txt").write_text("\n".join(lines))
    found = commands(tmp_path)
    assert [words[0] for words in found] == [
        "sft", *["sample", "score", "pairs", "train"] * 2,
        "evaluate", "evaluate", "evaluate", "reward", "evaluate",
    ]  # fmt: skip
    # Perplexity of a few lines of the book says as much here as that of all.
    monkeypatch.chdir(tmp_path)
    for words in found:
        if "--text" in words and words[0] == "evaluate":
            Path("book.txt").write_text("\n".join(lines[:20]))
        assert main([*words, *SMALLER[words[0]]]) == 0, words
    compared = json.loads(Path("runs/evaluation/evaluation.json").read_text())["models"]
    assert [entry["name"] for entry in compared] == ["runs/sft", "runs/1/rebel", "runs/2/rebel"]
    assert all(entry["reward"]["n"] == 3 for entry in compared)
    assert [abs(entry["kl"]["value"]) > 1e-4 for entry in compared] == [False, True, True]
    files = [Path(f"runs/{i}/samples.jsonl").read_text().splitlines() for i in (1, 2)]
    first, second = ([json.loads(row) for row in rows] for rows in files)
    assert [row["id"] for row in first] == list(range(8))
    assert min(row["id"] for row in second) > 8  # the next shard
    assert os.path.getsize("runs/frontier/frontier.png") > 1000
    assert re.search(
        r"accuracy [\d.]+% \[.*\] on 2 pairs of runs/1/pairs.test.jsonl", capsys.readouterr().out
    )
