"""What commands share: models with their tokenizers from files, tasks, and rewards that are given by name."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from palm_rlhf.models.checkpoint import CheckpointError, load_palm, save_palm
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy
from palm_rlhf.tasks.calculator import Calculator, gsm8k, products
from palm_rlhf.tokens import FileTokenizer, Tokenizer, check_fits, load_tokenizer
from rlhf_kernels.runtime.files import write_aside

# Of the calculator's problems: 1*1= to 299*4=.
FACTORS = (299, 4)
# Adapters of what learns to write.
ACTOR = "actor"
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the token that ends what it writes."""

    model: PaLM
    tokenizer: Tokenizer
    stop: int


def device(name: str | None) -> torch.device:
    """The device of that name; without one the GPU, or else the CPU. ValueError for one that is not here."""
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the device {name!r} cannot be used: {reason}") from error
    return found


def weights_file(path: Path, name: str = WEIGHTS) -> Path:
    """The file itself, or that of the run in the folder; CheckpointError where it has none."""
    if not path.is_dir():
        return path
    if not (path / name).is_file():
        unfinished = (path / "checkpoints").is_dir()
        raise CheckpointError(
            f"{path} has no {name}: "
            + (
                "its training is not finished. Go on with the command that began it."
                if unfinished
                else "it is no run."
            )
        )
    return path / name


def load_model(
    path: Path,
    *,
    tokenizer: str | None,
    pad: str | None = None,
    stop: str | None = None,
    on: str | None = None,
) -> Loaded:
    """The model of a run's folder or a file, with the tokenizer that is named there unless one is given.

    Raises:
        ValueError: it cannot be read, or the tokenizer is missing or does not fit.
    """
    file = weights_file(path)
    model = load_palm(file, device=device(on))
    kept = metadata(file)
    if tokenizer is not None:
        found = load_tokenizer(tokenizer, pad=pad, stop=stop)
        end = found.stop
    elif "tokenizer" in kept:
        found = kept_tokenizer(kept, file)
        end = kept.get("stop", found.stop)
    else:
        raise CheckpointError(
            f"{file} does not say what its tokens are. Give --tokenizer: bytes or a tokenizer.json."
        )
    check_fits(found, model)
    return Loaded(model, found, end)


def kept_tokenizer(kept: dict[str, Any], file: Path) -> Tokenizer:
    """The tokenizer that metadata name, beside the file that they are of."""
    name = kept["tokenizer"]
    if name == "bytes":
        return load_tokenizer(name)
    return load_tokenizer(file.parent / name, pad=kept.get("pad"), stop=kept.get("end"))


def metadata(file: Path) -> dict[str, Any]:
    """What a safetensors file says of itself; nothing for a file of another kind."""
    try:
        with safe_open(file, framework="pt") as opened:
            raw = opened.metadata() or {}
    except SafetensorError:
        return {}
    return {name: json.loads(text) for name, text in raw.items() if name != "format"}


def tokenizer_metadata(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What to keep of a tokenizer with a model in `folder`; a tokenizer file is copied there first."""
    if not isinstance(tokenizer, FileTokenizer):
        return {"tokenizer": tokenizer.name}
    write_aside(folder / TOKENIZER, tokenizer.text)
    return {
        "tokenizer": TOKENIZER,
        "pad": tokenizer.token(tokenizer.pad),
        "end": tokenizer.token(tokenizer.stop),
    }


def save_model(folder: Path, loaded: Loaded) -> Path:
    """Writes the model with all that `load_model` needs."""
    kept = tokenizer_metadata(folder, loaded.tokenizer)
    return save_palm(folder / WEIGHTS, loaded.model, stop=loaded.stop, **kept)


def merged(policy: Policy, without: Sequence[str] = ()) -> PaLM:
    """The policy as a model without adapters of ours, so that it needs no scope to be used.

    `without` are other adapters of ours that may be on it.
    """
    if policy.scope is None:
        return policy.model
    model = copy.deepcopy(policy.model)
    model.merge_finetune_params(policy.scope)
    for scope in without:
        if scope in model.finetune_modules:
            model.remove_finetune_params(scope)
    return model


def make_task(name: str | None, problems: Path | None, factors: tuple[int, int]) -> Calculator | None:
    """The task that flags name, if they name one."""
    if name is not None and problems is not None:
        raise ValueError(
            "--task and --gsm8k exclude each other: GSM8K's products are the calculator's problems."
        )
    if problems is not None:
        return gsm8k(problems)
    return products(*factors) if name is not None else None


def load_function(where: str, takes: Sequence[str] = ("prompt", "response")) -> Callable[..., float]:
    """The function that `FILE.py:name` means; ValueError where there is none that takes these arguments."""
    path, colon, name = where.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(f"a reward is given as FILE.py:function, got {where!r}")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path} with the reward {name}()")
    spec = importlib.util.spec_from_file_location("palm_rlhf_reward", path)
    if spec is None:
        raise ValueError(f"{path} is no Python file: a reward is given as FILE.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{path} has no function {name}()")
    try:
        inspect.signature(function).bind(*takes)
    except TypeError as error:
        raise ValueError(f"{path}: {name}() must take ({', '.join(takes)}): {error}") from error
    return function
