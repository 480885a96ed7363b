"""A run as a row of models: what it began with, its checkpoints, and its result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from palm_rlhf.commands.common import ACTOR, HF_MODEL, WEIGHTS, HFOptions, Loaded, load_model
from palm_rlhf.commands.train import CRITIC
from palm_rlhf.models.checkpoint import CheckpointError, read_tensors, unshared
from palm_rlhf.tasks.calculator import Calculator
from palm_rlhf.tokens import stop_token
from palm_rlhf.trainers.checkpoints import STATE, Checkpoints
from palm_rlhf.trainers.frozen import check_frozen

# What learns to write, in checkpoints of train and of sft.
POLICIES = ("policy.safetensors", "model.safetensors")


def models_of_run(folder: Path) -> list[Path]:
    """Start, checkpoints and result of a `palm-rlhf train` run, in order; the result once.

    Raises:
        ValueError: the folder is no such run, or has nothing yet.
    """
    start = Path(_config(folder)["model"])
    steps = Checkpoints(folder / "checkpoints").all()
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoints: there is nothing to compare {start} with")
    # The last checkpoint of a finished run is its result.
    finished = (folder / WEIGHTS).is_file() or (folder / HF_MODEL).is_dir()
    return [start, *(steps[:-1] if finished else steps), *([folder] if finished else [])]


def load_any(
    path: Path, *, tokenizer: str | None = None, on: str | None = None, hf: HFOptions | None = None
) -> Loaded:
    """A model as `load_model` finds it, or the policy of a checkpoint with its adapters merged.

    A checkpoint's run tells what it began with, which is read as well: a checkpoint of adapters holds nothing
    else.

    Raises:
        ValueError: it cannot be read, or what it began with is not what it was.
    """
    file = next((path / name for name in POLICIES if (path / name).is_file()), None)
    if file is None or not (path / STATE).is_file():
        return load_model(path, tokenizer=tokenizer, on=on, hf=hf)
    run = path.parent.parent
    config, loaded = _config(run), begun_with(run, tokenizer=tokenizer, on=on, hf=hf)
    model, (tensors, metadata) = loaded.model, read_tensors(file)
    scopes = [scope for scope in (ACTOR, CRITIC) if any(f".{scope}." in name for name in tensors)]
    for scope in scopes:
        model.add_finetune_params(
            scope,
            config["lora_r"],
            tuple(config["lora_targets"]),
            config["last_layers"],
            config.get("lora_alpha"),
        )
    own = unshared(model)
    check_frozen(own, tensors, metadata, f"{path} (of a run that began with {config['model']})")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    for scope in scopes:
        (model.merge_finetune_params if scope == ACTOR else model.remove_finetune_params)(scope)
    return loaded


def begun_with(
    folder: Path, *, tokenizer: str | None = None, on: str | None = None, hf: HFOptions | None = None
) -> Loaded:
    """The model that a run began with, asked as the run asks it: its chat, its stop token, its dtype.

    Raises:
        ValueError: the folder is no run that began with a model, or that cannot be read.
    """
    config, given = _config(folder), hf or HFOptions()
    own = {} if tokenizer is not None else {"pad": config.get("pad_token"), "stop": config.get("stop_token")}
    loaded = load_model(
        Path(config["model"]),
        tokenizer=config.get("tokenizer") if tokenizer is None else tokenizer,
        on=on,
        hf=replace(
            given,
            chat=given.chat or config.get("chat", False),
            system=config.get("system") if given.system is None else given.system,
            dtype=config.get("dtype", "float32"),
        ),
        **own,
    )
    return replace(loaded, stop=_stop(config, loaded, given))


def _stop(config: dict[str, Any], loaded: Loaded, given: HFOptions) -> int:
    """What ended the responses of a run, as `train` and `sft` find it."""
    solved = config.get("task") or config.get("gsm8k")
    # A chat that is asked for only now ends as its template says.
    if solved and not (given.chat and not config.get("chat")):
        return stop_token(loaded.tokenizer, Calculator.stop)
    return loaded.tokenizer.stop if config.get("command") == "sft" else loaded.stop


def _config(folder: Path) -> dict[str, Any]:
    """What a run that began with a model was called with."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
        start = found["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no run of palm-rlhf train") from error
    if not start:
        raise CheckpointError(f"the run {folder} began with no model, so that there is none to compare with")
    return found
