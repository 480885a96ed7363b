"""What commands share: models with their tokenizers from files, tasks, and rewards that are given by name."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from palm_rlhf.models.checkpoint import CheckpointError, load_palm, save_palm
from palm_rlhf.models.finetune import apart, learned
from palm_rlhf.models.hf import HFModel, load_hf
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy
from palm_rlhf.rewards.text import NAMES, text_reward
from palm_rlhf.tasks.calculator import Calculator, gsm8k, products
from palm_rlhf.tokens import HUB, FileTokenizer, HFTokenizer, Tokenizer, check_fits, load_tokenizer
from rlhf_kernels.runtime.files import write_aside

# Of the calculator's problems: 1*1= to 299*4=.
FACTORS = (299, 4)
# Adapters of what learns to write.
ACTOR = "actor"
WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
# A model or tokenizer of transformers in a run's folder, and in the former what is not transformers'.
HF_MODEL, HF_TOKENIZER, HF_KEPT = "model", "tokenizer", "palm_rlhf.json"


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the token that ends what it writes."""

    model: PaLM | HFModel
    tokenizer: Tokenizer
    stop: int


@dataclass(frozen=True)
class HFOptions:
    """What models and tokenizers of transformers take (--model hf:NAME or a folder of it)."""

    chat: bool = False
    """Put prompts into the tokenizer's chat template. What was trained so stays so."""
    system: str | None = None
    """Message of the system in that template."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights of a model of transformers. In 16 bits they do not learn, only adapters beside bfloat16;
    --precision bf16 trains weights in float32 by products in bfloat16."""
    patch: bool = False
    """Let rlhf_kernels' operators replace those of a model of transformers (rlhf-kernels patch)."""
    checkpoint_layers: bool = False
    """Compute the layers of a model of transformers again in the backward: less memory, more time."""


@dataclass(frozen=True)
class Tuning:
    """What of a model learns."""

    lora: bool = True
    """Learn adapters on the frozen model, not its weights; with --no-lora models that have to stay as they
    were are copies."""
    lora_r: int = 8
    """Rank of the adapters."""
    lora_alpha: float | None = None
    """What the adapters add is scaled by this over their rank; default: by 1."""
    lora_targets: tuple[str, ...] = ("attention",)
    """Projections that get adapters: attention, mlp, all, or names: of PaLM q, k, v, o, up, gate, down; of a
    model of transformers such as q_proj."""
    last_layers: int | None = None
    """Only so many of the last layers learn, by adapters or by their weights; embeddings, last norm and head
    stay as they are. None: all."""

    def __post_init__(self) -> None:
        if not self.lora and (self.lora_alpha is not None or self.lora_targets != ("attention",)):
            raise ValueError("--lora-targets and --lora-alpha are of adapters: they need --lora")

    def policy(self, model: PaLM | HFModel, scope: str = ACTOR) -> Policy:
        """The model as what learns; adapters of that name are added to it."""
        if not self.lora:
            return Policy(model, None, self.last_layers)
        model.add_finetune_params(scope, self.lora_r, self.lora_targets, self.last_layers, self.lora_alpha)
        return Policy(model, scope)

    def apart(self, model: PaLM | HFModel) -> PaLM | HFModel:
        """The model again: what learns of it is a copy, the rest is shared."""
        return apart(model, learned(model, None, self.last_layers))


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


def hf_name(path: Path) -> str | None:
    """The name or folder of the model of transformers that `path` means: hf:NAME, a folder, or a run."""
    if str(path).startswith(HUB):
        return str(path).removeprefix(HUB)
    for folder in (path, path / HF_MODEL):
        try:
            config = json.loads((folder / "config.json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and "model_type" in config:
            return str(folder)
    return None


def load_model(
    path: Path,
    *,
    tokenizer: str | None,
    pad: str | None = None,
    stop: str | None = None,
    on: str | None = None,
    hf: HFOptions | None = None,
) -> Loaded:
    """The model of a run's folder, a file or transformers, with the tokenizer that is named there or given.

    Args:
        path: a run, a checkpoint, a folder of transformers, or hf:NAME with a name on the hub or a path.
        tokenizer: see `tokens.load_tokenizer`; None: the model's own.
        pad, stop: names of its tokens.
        on: device.
        hf: how a model of transformers is loaded.

    Raises:
        ValueError: it cannot be read, or the tokenizer is missing or does not fit.
    """
    name = hf_name(path)
    if name is not None:
        return _load_hf(name, tokenizer, pad, stop, on, hf or HFOptions())
    options = hf or HFOptions()
    if options != HFOptions(options.chat, options.system):
        raise ValueError(
            f"--dtype, --patch and --checkpoint-layers are for models of transformers, and {path} is none"
        )
    if not path.exists():
        hint = f". A model on the hub is given as {HUB}NAME, such as {HUB}Qwen/Qwen2.5-0.5B."
        raise CheckpointError(f"there is no checkpoint {path}{hint}")
    file = weights_file(path)
    model = load_palm(file, device=device(on))
    return _with_tokenizer(model, metadata(file), file, tokenizer, pad, stop, options)


def _load_hf(
    name: str, tokenizer: str | None, pad: str | None, stop: str | None, on: str | None, options: HFOptions
) -> Loaded:
    try:
        kept = json.loads((Path(name) / HF_KEPT).read_bytes())
    except OSError:  # not of a run
        kept = {"tokenizer": ""}
    model = load_hf(
        name,
        device=device(on),
        dtype=options.dtype,
        patch=options.patch,
        checkpoint_layers=options.checkpoint_layers,
    )
    if tokenizer is None and kept["tokenizer"] == "" and not Path(name).is_dir():
        tokenizer = HUB + name
    return _with_tokenizer(model, kept, Path(name) / HF_KEPT, tokenizer, pad, stop, options)


def _with_tokenizer(
    model: PaLM | HFModel,
    kept: dict[str, Any],
    file: Path,
    tokenizer: str | None,
    pad: str | None,
    stop: str | None,
    options: HFOptions,
) -> Loaded:
    """The model with a tokenizer that is given, or else with the one that `kept` names beside `file`."""
    system = kept.get("system") if options.system is None else options.system
    if options.chat and not kept.get("chat", False):
        # Trained plainly, it ends a turn as its template says, not a text as it did.
        kept = {name: value for name, value in kept.items() if name not in ("stop", "end")}
    chat = {"chat": options.chat or kept.get("chat", False), "system": system}
    if tokenizer is not None:
        found = load_tokenizer(tokenizer, pad=pad, stop=stop, **chat)
        end = found.stop
    elif "tokenizer" in kept:
        found = kept_tokenizer(kept, file, pad, stop, **chat)
        end = kept.get("stop", found.stop) if stop is None else found.stop
    else:
        raise CheckpointError(
            f"{file} does not say what its tokens are. Give --tokenizer: bytes or a tokenizer.json."
        )
    check_fits(found, model)
    return Loaded(model, found, end)


def kept_tokenizer(
    kept: dict[str, Any], file: Path, pad: str | None = None, stop: str | None = None, **chat: Any
) -> Tokenizer:
    """The tokenizer that metadata name, beside the file that they are of."""
    name = kept["tokenizer"]
    if name == "bytes":
        return load_tokenizer(name, **chat)
    own = {"pad": pad or kept.get("pad"), "stop": stop or kept.get("end")}
    return load_tokenizer(file.parent / name, **own, **chat)


def metadata(file: Path) -> dict[str, Any]:
    """What a safetensors file says of itself; nothing for a file of another kind."""
    try:
        with safe_open(file, framework="pt") as opened:
            raw = opened.metadata() or {}
    except SafetensorError:
        return {}
    return {name: json.loads(text) for name, text in raw.items() if name != "format"}


def tokenizer_metadata(folder: Path, tokenizer: Tokenizer, own: str = HF_TOKENIZER) -> dict[str, Any]:
    """What to keep of a tokenizer with a model in `folder`; its files are written there first.

    Those of transformers have a folder of their own in it, named `own`.
    """
    if not isinstance(tokenizer, FileTokenizer | HFTokenizer):
        return {"tokenizer": tokenizer.name}
    kept = {"pad": tokenizer.token(tokenizer.pad), "end": tokenizer.token(tokenizer.stop)}
    if isinstance(tokenizer, FileTokenizer):
        write_aside(folder / TOKENIZER, tokenizer.text)
        return {"tokenizer": TOKENIZER, **kept}
    tokenizer.save(folder / own)
    return {"tokenizer": own, **kept, "chat": tokenizer.chat, "system": tokenizer.system}


def save_model(folder: Path, loaded: Loaded) -> Path:
    """Writes the model with all that `load_model` needs: a file of ours, or a folder of transformers."""
    if isinstance(loaded.model, HFModel):
        # Last comes the file without which the folder is another program's.
        made = loaded.model.save_pretrained(folder / HF_MODEL)
        kept = tokenizer_metadata(made, loaded.tokenizer, own="")
        write_aside(made / HF_KEPT, json.dumps({"stop": loaded.stop, **kept}, indent=1))
        return made
    kept = tokenizer_metadata(folder, loaded.tokenizer)
    return save_palm(folder / WEIGHTS, loaded.model, stop=loaded.stop, **kept)


def merged(policy: Policy, without: Sequence[str] = ()) -> PaLM | HFModel:
    """The policy as a model without adapters of ours, so that it needs no scope to be used.

    `without` are other adapters of ours that may be on it.
    """
    if policy.scope is None:
        return policy.model
    model = copy.deepcopy(policy.model)
    model.merge_finetune_params(policy.scope)
    for scope in without:
        if scope in model.scopes:
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
    """What `FILE.py:name` or a name of `rewards.text` means; ValueError where it takes other arguments."""
    if (named := text_reward(where)) is not None and len(takes) == 2:
        return named
    path, colon, name = where.rpartition(":")
    if not colon or not name.isidentifier():
        kinds = ", ".join(f"{kind}:..." for kind in NAMES)
        raise ValueError(f"a reward is given as FILE.py:function, or as one of {kinds}, got {where!r}")
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
