"""A run as a row of models: what it began with, its checkpoints, and its result."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from palm_rlhf.commands.common import ACTOR, WEIGHTS, Loaded, load_model
from palm_rlhf.models.checkpoint import CheckpointError, palm_from_state, read_tensors
from palm_rlhf.models.palm import PaLM
from palm_rlhf.trainers.checkpoints import Checkpoints

POLICY = "policy.safetensors"
_ADAPTERS = "finetune_modules."


def models_of_run(folder: Path) -> list[Path]:
    """Start, checkpoints and result of a `palm-rlhf train` run, in order; the result once.

    Raises:
        ValueError: the folder is no such run, or has nothing yet.
    """
    start = _start(folder)
    steps = Checkpoints(folder / "checkpoints").all()
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoints: there is nothing to compare {start} with")
    # The last checkpoint of a finished run is its result.
    finished = (folder / WEIGHTS).is_file() or (folder / "model").is_dir()
    return [start, *(steps[:-1] if finished else steps), *([folder] if finished else [])]


def load_any(path: Path, *, tokenizer: str | None = None, on: str | None = None) -> Loaded:
    """A model as `load_model` finds it, or the policy of a checkpoint with its adapters merged.

    Raises:
        ValueError: it cannot be read; a checkpoint's run tells what it began with, which is read as well.
    """
    if not (path / POLICY).is_file():
        return load_model(path, tokenizer=tokenizer, on=on)
    base = load_model(_start(path.parent.parent), tokenizer=tokenizer, on=on)
    if not isinstance(base.model, PaLM):
        raise CheckpointError(
            f"{path} is of a {type(base.model).__name__}: of such only a finished run can be read. Name that."
        )
    tensors, _ = read_tensors(path / POLICY, base.model.device)
    named = [name.split(".") for name in tensors if name.startswith(_ADAPTERS) and name.endswith(".A")]
    scopes = {parts[1]: tensors[".".join(parts)].shape[1] for parts in named}
    model = palm_from_state(tensors, {"config": asdict(base.model.config), "scopes": scopes}, str(path))
    if ACTOR in scopes:
        model.merge_finetune_params(ACTOR)
    for scope in list(model.finetune_modules):
        model.remove_finetune_params(scope)
    return Loaded(model, base.tokenizer, base.stop)


def _start(folder: Path) -> Path:
    """The model that a run began with."""
    try:
        start = json.loads((folder / "config.json").read_bytes())["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no run of palm-rlhf train") from error
    if not start:
        raise CheckpointError(f"the run {folder} began with no model, so that there is none to compare with")
    return Path(start)
