"""Rewards by name, as `--reward` takes them: of generations for trainers, of texts for the pipeline.

- FILE.py:function, and the names of `rewards.text.NAMES`: of texts;
- run:RUN, a reward model; implicit:RUN, what training by preferences made more probable in a run;
- hf:NAME or hf:NAME@LABEL, a sequence-classification model of transformers;
- FILE.json, an `Ensemble`: {"combine": "mean", "rewards": [names]}, with "weights" and "k".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from palm_rlhf.commands.common import (
    Loaded,
    device,
    kept_tokenizer,
    load_function,
    load_model,
    metadata,
    weights_file,
)
from palm_rlhf.generation import Generation
from palm_rlhf.models.value import Policy, frozen
from palm_rlhf.pipeline.files import digest, version
from palm_rlhf.pipeline.scoring import (
    ClassifierScorer,
    EnsembleScorer,
    ImplicitScorer,
    RewardModelScorer,
    RuleScorer,
    Scorer,
)
from palm_rlhf.rewards import Ensemble, ImplicitReward, ModelReward, ProgrammaticReward, load_reward_model
from palm_rlhf.rewards.text import NAMES
from palm_rlhf.tokens import Tokenizer, check_fits

Reward = Callable[[Generation], Tensor]


class Name(NamedTuple):
    """A reward's name in parts.

    Attributes:
        kind: run, implicit, hf, json or text.
        what: the run, the model, the file, or the whole name of what reads texts.
        label: of a classifier.
    """

    kind: str
    what: str
    label: str | None = None

    @classmethod
    def of(cls, name: str) -> Name:
        """The parts of a name."""
        kind, _, what = name.partition(":")
        if name.endswith(".json") and kind not in NAMES:
            return cls("json", name)
        if kind == "hf":
            model, _, label = what.partition("@")
            return cls(kind, model, label or None)
        return cls(kind, what) if kind in ("run", "implicit") else cls("text", name)


def named_reward(name: str, tokenizer: Tokenizer, stop: int, on: str | None = None) -> Reward:
    """The reward of a name, for a trainer.

    Args:
        name: of the reward. tokenizer, stop: the policy's. on: device of models.

    Raises:
        ValueError: it is none of them, or what it names cannot be read.
    """
    kind, what, label = Name.of(name)
    if kind == "json":
        return _ensemble(Path(what), lambda member: named_reward(member, tokenizer, stop, on))
    if kind == "run":
        from palm_rlhf.commands.reward import load_reward

        return load_reward(Path(what), tokenizer, on=on)
    if kind == "implicit":
        reward, _ = _implicit(Path(what), on)
        for model in (reward.policy.model, reward.reference.model):
            check_fits(tokenizer, model)
        return reward
    if kind == "hf":
        from palm_rlhf.rewards.classifier import Classifier, ClassifierReward

        return ClassifierReward(Classifier(what, label=label, device=device(on)), tokenizer, stop=stop)
    return ProgrammaticReward(load_function(what), tokenizer, stop=stop)


def named_scorer(
    name: str | Name, sampled_with: str, on: str | None = None, *, max_text_tokens: int | None = None
) -> Scorer:
    """The reward of a name, for responses in a file.

    Args:
        name: of the reward. on: device of models.
        sampled_with: identity of the tokenizer that the responses' tokens are of.
        max_text_tokens: of a classifier.

    Raises:
        ValueError: it is none of them, or what it names cannot be read.
    """
    kind, what, label = name if isinstance(name, Name) else Name.of(name)
    if kind == "json":
        options = {"on": on, "max_text_tokens": max_text_tokens}
        return EnsembleScorer(
            _ensemble(Path(what), lambda member: named_scorer(member, sampled_with, **options))
        )
    if kind == "run":
        return _reward_model(Path(what), sampled_with, on)
    if kind == "implicit":
        reward, policy = _implicit(Path(what), on)
        return ImplicitScorer(reward, policy.tokenizer, policy.stop, sampled_with)
    if kind == "hf":
        from palm_rlhf.rewards.classifier import Classifier

        return ClassifierScorer(Classifier(what, label=label, device=device(on), max_tokens=max_text_tokens))
    return RuleScorer(ProgrammaticReward(load_function(what), on="tokens"))


def reward_version(name: str) -> list[Any]:
    """Stands for all that a reward of this name reads: see `files.digest` and `files.version`."""
    kind, what, _ = Name.of(name)
    if kind == "json":
        return [digest(what), *(reward_version(member) for member in _says(Path(what))["rewards"])]
    if kind == "implicit":
        return [version(each) for each in _both(Path(what))]
    there = [Path(part) for part in what.split(":") if Path(part).exists()]
    return [digest(path) if path.is_file() else version(path) for path in there]


def _says(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a file of an ensemble holds; ValueError where it is none, or is `within` itself."""
    if path.resolve() in within:
        raise ValueError(f"the reward {path} is a member of itself: take its name out of {within[-1]}")
    try:
        says: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error.msg} in line {error.lineno}") from error
    known = {"combine", "rewards", "weights", "k"}
    if not isinstance(says, dict) or not isinstance(says.get("rewards"), list) or says.keys() - known:
        raise ValueError(
            f'{path} must hold {{"combine": "mean", "rewards": [names]}}, with "weights" and "k" where wanted'
        )
    weights = says.get("weights")
    if weights is not None and not (isinstance(weights, list) and all(map(_number, weights))):
        raise ValueError(f'{path}: "weights" must be a list of numbers, one for each reward, got {weights!r}')
    if "k" in says and not _number(says["k"]):
        raise ValueError(f'{path}: "k" must be a number of deviations, got {says["k"]!r}')
    names = [str(name) for name in says["rewards"]]
    for name in names:
        if Name.of(name).kind == "json":
            _says(Path(name), (*within, path.resolve()))
    return says | {"rewards": names}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ensemble(path: Path, member: Callable[[str], Any]) -> Ensemble:
    says = _says(path)
    return Ensemble([member(name) for name in says.pop("rewards")], **says)


def _reward_model(path: Path, sampled_with: str, on: str | None) -> RewardModelScorer:
    file = weights_file(path)
    model = load_reward_model(file, device=device(on)).requires_grad_(False)
    kept = metadata(file)
    if "tokenizer" not in kept:
        raise ValueError(f"{file} does not say what its tokens are: it is not of palm-rlhf reward")
    chat = {"chat": kept.get("chat", False), "system": kept.get("system")}
    tokenizer = kept_tokenizer(kept, file, **chat)
    return RewardModelScorer(ModelReward(model), tokenizer, kept.get("stop", tokenizer.stop), sampled_with)


def _both(path: Path) -> tuple[Path, Path]:
    """A run, and the model that it began with."""
    try:
        return path, Path(_config(path)["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no run that began with a model: implicit:RUN takes one of palm-rlhf train dpo or kto"
        ) from error


def _config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_bytes())


def _implicit(path: Path, on: str | None) -> tuple[ImplicitReward, Loaded]:
    """The reward, and the policy of the run with its tokenizer."""
    both, config = _both(path), _config(path)
    loaded = [load_model(each, tokenizer=config.get("tokenizer"), on=on) for each in both]
    policy, reference = (Policy(frozen(each.model)) for each in loaded)
    made = {"beta": config.get("beta", 0.1), "temperature": config.get("temperature", 1.0)}
    return ImplicitReward(policy, reference, **made), loaded[0]
