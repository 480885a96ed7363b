"""What the commands of the pipeline share: flags of prompts and of scores, and how a stage ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from palm_rlhf.commands.common import FACTORS, Loaded, hf_name, make_task
from palm_rlhf.commands.rewards import Name, named_scorer, reward_version
from palm_rlhf.pipeline.files import digest, stage_config, version
from palm_rlhf.pipeline.sampling import read_prompts
from palm_rlhf.pipeline.scoring import RuleScorer, Scorer
from palm_rlhf.rewards import ProgrammaticReward
from palm_rlhf.tokens import identity


@dataclass
class Prompts:
    """Where prompts come from: one of three."""

    prompts_file: Path | None = None
    """Prompts: a text file with one a line, or JSON lines or Parquet with "prompt" or "messages"."""
    task: Literal["calculator"] | None = None
    """Prompts of this task instead: those that it trains on."""
    gsm8k: Path | None = None
    """Instead: the products among the calculator steps in GSM8K's train.jsonl."""
    factors: tuple[int, int] = FACTORS
    """Largest first and second factor in --task calculator."""
    held_out: bool = False
    """The task's held-out prompts, not those that it trains on."""

    def identity(self) -> dict[str, Any]:
        """What the prompts depend on, for a stage's config."""
        if self.prompts_file is not None:
            return {"prompts": digest(self.prompts_file)}
        problems = self.factors if self.gsm8k is None else digest(self.gsm8k)
        return {"prompts": [self.task or "gsm8k", problems, "held out" if self.held_out else "train"]}

    def dialogues(self) -> list[list[dict[str, str]]]:
        """All prompts as dialogues; ValueError where none or two sources are given."""
        task = make_task(self.task, self.gsm8k, self.factors)
        if (task is None) == (self.prompts_file is None):
            raise ValueError(
                "give one kind of prompts: --prompts-file FILE, --task calculator, or --gsm8k FILE"
            )
        if task is None:
            return read_prompts(self.prompts_file)
        texts = task.held_out if self.held_out else task.train
        return [[{"role": "user", "content": text}] for text in texts]


@dataclass
class Scores:
    """What scores responses: one of three."""

    reward: str | None = None
    """FILE.py:function, called with the texts of a prompt and a response; or another by name:
    characters:5-20, sentiment:FILE, run:RUN, implicit:RUN, hf:NAME, FILE.json of several: palm-rlhf -h."""
    reward_model: str | None = None
    """Run of palm-rlhf reward, or a sequence-classification model of transformers: its folder, or hf:NAME."""
    rule: Literal["calculator"] | None = None
    """1 for the right answer of this task, else 0."""
    label: str | None = None
    """Name or index of the good label, where the --reward-model has several: scores are its log-odds."""
    max_text_tokens: int | None = None
    """A text loses its beginning to fit a --reward-model of Hugging Face; default: what the model allows."""

    def given(self) -> bool:
        """Whether any is named."""
        return any((self.reward, self.reward_model, self.rule))

    def identity(self) -> dict[str, Any]:
        """What scores depend on, for a stage's config."""
        found: dict[str, Any] = {"reward": self.reward, "rule": self.rule, "reward_model": self.reward_model}
        if self.reward is not None:
            found["reward_version"] = reward_version(self.reward)
        if self.reward_model is not None:
            found |= {"reward_version": version(self.reward_model), "label": self.label}
            found["max_text_tokens"] = self.max_text_tokens
        return found

    def scorer(self, sampled_with: str, on: str | None) -> Scorer:
        """The one that is named; ValueError where none or two are.

        Args:
            sampled_with: identity of the tokenizer that the responses' tokens are of.
            on: device by name.
        """
        if sum(x is not None for x in (self.reward, self.reward_model, self.rule)) != 1:
            raise ValueError(
                "give one thing that scores: --reward FILE.py:function, --reward-model RUN, or "
                "--rule calculator"
            )
        if self.rule is not None:
            from palm_rlhf.tasks.calculator import Calculator

            return RuleScorer(ProgrammaticReward(Calculator.reward, on="tokens"))
        if self.reward_model is None:
            name = Name.of(self.reward)
        else:
            foreign = hf_name(Path(self.reward_model))
            name = Name("run", self.reward_model) if foreign is None else Name("hf", foreign)
        if name.label is None:
            name = name._replace(label=self.label)
        return named_scorer(name, sampled_with, on, max_text_tokens=self.max_text_tokens)


def origin(file: Path) -> str:
    """Identity of the tokenizer that a file of pairs has tokens of; "" where it is not said."""
    return (stage_config(file) or {}).get("tokenizer", "")


def check_origin(file: Path, model: Path, loaded: Loaded, temperature: float | None = None) -> None:
    """Whether pairs of `palm-rlhf pairs` are in this model's tokens; a word if they were drawn otherwise.

    Args:
        file: of the pairs. model: what reads them, `loaded`.
        temperature: that log-probabilities are taken at; None: none are.

    Raises:
        ValueError: the tokens are another tokenizer's.
    """
    made = origin(file)
    if not made:
        return
    if made != identity(loaded.tokenizer):
        raise ValueError(
            f"{file} holds tokens of {made}, and {model} writes those of {identity(loaded.tokenizer)} "
            f"({loaded.tokenizer.name}). Sample from a model with the same tokenizer."
        )
    drawn = stage_config(file)["sampling"]["temperature"]
    if temperature is not None and drawn and drawn != temperature:
        print(
            f"palm-rlhf: {file} was sampled at temperature {drawn:g}, and log-probabilities are taken at "
            f"{temperature:g}. --temperature {drawn:g} takes those that it was sampled with.",
            file=sys.stderr,
        )


def concluded(summary: Mapping[str, Any], as_json: bool, lines: list[str]) -> int:
    """Says how a stage ended: as one JSON object, or in these lines; the exit code."""
    print(json.dumps(summary) if as_json else "\n".join(lines))
    return 0
