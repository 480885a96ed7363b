"""Rewards by name, as `--reward` takes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from palm_rlhf.commands.common import load_function, load_model
from palm_rlhf.generation import Generation
from palm_rlhf.models.value import Policy, frozen
from palm_rlhf.rewards import Ensemble, ImplicitReward, ProgrammaticReward
from palm_rlhf.tokens import Tokenizer, check_fits

Reward = Callable[[Generation], Tensor]


def named_reward(name: str, tokenizer: Tokenizer, stop: int, on: str | None = None) -> Reward:
    """The reward of a name.

    - FILE.py:function, and the names of `rewards.text.NAMES`: of texts;
    - run:RUN, a reward model; implicit:RUN, what training by preferences made more probable in a run;
    - hf:NAME or hf:NAME@LABEL, a sequence-classification model of transformers;
    - FILE.json, an `Ensemble`: {"combine": "mean", "rewards": [names]}, with "weights" and "k".

    Args:
        name: of the reward. tokenizer, stop: the policy's. on: device of models.

    Raises:
        ValueError: it is none of them, or what it names cannot be read.
    """
    kind, _, what = name.partition(":")
    if name.endswith(".json"):
        return _ensemble(Path(name), tokenizer, stop, on)
    if kind == "run":
        from palm_rlhf.commands.reward import load_reward

        return load_reward(Path(what), tokenizer, on=on)
    if kind == "implicit":
        return _implicit(Path(what), tokenizer, on)
    if kind == "hf":
        from palm_rlhf.commands.common import device
        from palm_rlhf.rewards.classifier import Classifier, ClassifierReward

        model, _, label = what.partition("@")
        return ClassifierReward(
            Classifier(model, label=label or None, device=device(on)), tokenizer, stop=stop
        )
    return ProgrammaticReward(load_function(name), tokenizer, stop=stop)


def _ensemble(path: Path, tokenizer: Tokenizer, stop: int, on: str | None) -> Ensemble:
    try:
        says: Any = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error.msg} in line {error.lineno}") from error
    known = {"combine", "rewards", "weights", "k"}
    if not isinstance(says, dict) or not isinstance(says.get("rewards"), list) or says.keys() - known:
        raise ValueError(
            f'{path} must hold {{"combine": "mean", "rewards": [names]}}, with "weights" and "k" where wanted'
        )
    members = [named_reward(str(name), tokenizer, stop, on) for name in says.pop("rewards")]
    return Ensemble(members, **says)


def _implicit(path: Path, tokenizer: Tokenizer, on: str | None) -> ImplicitReward:
    try:
        config = json.loads((path / "config.json").read_bytes())
        began = Path(config["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no run that began with a model: implicit:RUN takes one of palm-rlhf train dpo or kto"
        ) from error
    both = [load_model(each, tokenizer=config.get("tokenizer"), on=on).model for each in (path, began)]
    for model in both:
        check_fits(tokenizer, model)
    policy, reference = (Policy(frozen(model)) for model in both)
    return ImplicitReward(policy, reference, beta=config.get("beta", 0.1))
