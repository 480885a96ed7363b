"""The workflows call commands and targets that exist, with options that exist."""

import re
import shlex
from pathlib import Path

import pytest

from rlhf_kernels import cli

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _lines(path):
    """Every line of shell of a workflow."""
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            yield from step.get("run", "").splitlines()


def _calls():
    for path in WORKFLOWS:
        for line in _lines(path):
            found = re.search(r"(?:bin/rlhf-kernels|-m rlhf_kernels) ([^|]+)", line)
            if found:
                yield pytest.param(shlex.split(found[1]), id=f"{path.stem}: {found[1].split()[0]}")


@pytest.mark.parametrize("words", list(_calls()))
def test_commands_parse(words):
    if words[0] not in cli.COMMANDS:
        pytest.skip(f"this version has no {words[0]}")
    args = cli._parser().parse_args(words)
    assert args.run is cli.COMMANDS[words[0]][0]


def test_targets_exist_and_strangers_stay_off_the_gpu():
    assert len(WORKFLOWS) == 2
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        word for path in WORKFLOWS for line in _lines(path) for word in re.findall(r"make (\w+)", line)
    }
    assert targets == {"test", "setup", "gpu"}
    assert all(f"\n{target}:" in makefile for target in targets)
    for path in WORKFLOWS:
        text = path.read_text()
        content = yaml.safe_load(text)
        triggers = content[True]  # YAML reads `on` as a boolean
        assert content["permissions"] == {"contents": "read"}
        assert "pull_request_target" not in text
        if "self-hosted" in text:
            assert "pull_request" not in triggers
        # What a stranger writes must not become shell: it goes through the environment.
        assert not [line for line in _lines(path) if "${{" in line]
