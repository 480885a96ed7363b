"""Models in files: safetensors of our own, and checkpoints of palm-rlhf-pytorch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from palm_rlhf.models.palm import PaLM

FORMAT = "palm_rlhf 1"
# Characters of another library's error that ours repeats: load_state_dict's names every tensor.
_LONGEST = 200


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or does not fit what it is loaded into."""


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
    """Writes tensors with JSON metadata as safetensors, aside and renamed, so that no half is ever there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            aside,
            metadata={"format": FORMAT, **{name: json.dumps(value) for name, value in metadata.items()}},
        )
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def read_tensors(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote: tensors and metadata; CheckpointError for anything else."""
    path = _existing(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} holds safetensors of another program: expected the format {FORMAT!r}, "
                    f"got {metadata.get('format')!r}."
                )
            # Cloned: in the file tensors lie at any offset, and a product's bits depend on the alignment.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}. Is it complete?") from error
    try:
        return tensors, {name: json.loads(text) for name, text in metadata.items() if name != "format"}
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its metadata is no JSON: {_sentence(error)}") from error


def palm_state(model: PaLM) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata that `palm_from_state` makes the model of again."""
    scopes = {scope: model.adapter_options(scope) for scope in model.scopes}
    return model.state_dict(), {"config": asdict(model.config), "scopes": scopes}


def palm_from_state(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], what: str = "the checkpoint"
) -> PaLM:
    """A PaLM with these tensors; CheckpointError where they do not fit its configuration."""
    try:
        with torch.device("meta"):
            model = PaLM(**metadata["config"])
            for scope, options in metadata.get("scopes", {}).items():
                # A number is the rank of adapters on the attention of every layer.
                options = options if isinstance(options, Mapping) else {"lora_r": options}
                model.add_finetune_params(scope, **options)
        model.load_state_dict(dict(tensors), assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{what} does not hold a PaLM: {_sentence(error)}") from error
    return model.requires_grad_(True)


def backbone_metadata(model: Any) -> dict[str, Any]:
    """What `backbone_from_state` needs beside the tensors: of a PaLM, or of a model of transformers."""
    if isinstance(model, PaLM):
        return palm_state(model)[1]
    scopes = {scope: model.adapter_options(scope) for scope in model.scopes}
    return {"library": "transformers", "config": model.configuration(), "scopes": scopes}


def backbone_from_state(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], what: str = "the checkpoint"
) -> Any:
    """A model with these tensors; CheckpointError where they do not fit its configuration."""
    if metadata.get("library") != "transformers":
        return palm_from_state(tensors, metadata, what)
    from palm_rlhf.models.hf import hf_from_configuration

    try:
        model = hf_from_configuration(metadata["config"])
        for scope, options in metadata["scopes"].items():
            model.add_finetune_params(scope, **options)
        own = unshared(model)
        if own.keys() != tensors.keys():
            raise KeyError(sorted(own.keys() ^ tensors.keys())[0])
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{what} does not hold a model of transformers: {_sentence(error)}") from error
    return model.requires_grad_(True)


def unshared(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, every tensor once: safetensors refuses memory that two names share."""
    seen: dict[int, str] = {}
    found = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if seen.setdefault(id(tensor), name) == name:
            found[name] = tensor
    return found


def save_palm(path: str | Path, model: PaLM, **metadata: Any) -> Path:
    """Writes a model with its adapters as safetensors; `metadata` is anything that JSON holds."""
    tensors, own = palm_state(model)
    return write_tensors(path, tensors, {"kind": "PaLM", **own, **metadata})


def load_palm(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    causal: bool = True,
    xpos_scale_base: int = 512,
    compat: bool = False,
) -> PaLM:
    """A PaLM from a file of ours, or from palm-rlhf-pytorch's `torch.save(palm.state_dict(), path)`.

    Args:
        path: the file. Pickles are read with `weights_only=True`: a checkpoint cannot run code.
        device: where to put it.
        causal, xpos_scale_base: what the foreign file does not say; a file of ours does.
        compat: for a foreign model with qk_rmsnorm, repeat its missing qk_scale (see PaLM).

    Raises:
        CheckpointError: no such file, no checkpoint, or not of a PaLM.
    """
    path = _existing(path)
    if not _pickled(path):
        tensors, metadata = read_tensors(path, device)
        if metadata.get("kind") != "PaLM":
            raise CheckpointError(f"{path} holds a {metadata.get('kind')}, expected a PaLM.")
        return palm_from_state(tensors, metadata, str(path))
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (
        Exception
    ) as error:  # of a damaged pickle any of a dozen, AssertionError and struct.error among them
        reason = _sentence(error)
        raise CheckpointError(f"{path} cannot be read as a checkpoint of plain tensors: {reason}") from error
    return from_upstream(state, causal=causal, xpos_scale_base=xpos_scale_base, compat=compat, what=str(path))


def from_upstream(
    state: Mapping[str, Tensor],
    *,
    causal: bool = True,
    xpos_scale_base: int = 512,
    compat: bool = False,
    what: str = "the state",
) -> PaLM:
    """A PaLM with the weights of a `palm_rlhf_pytorch.PaLM.state_dict()`, adapters included."""
    if not isinstance(state, Mapping) or "token_emb.weight" not in state:
        got = ", ".join(list(map(str, state))[:3]) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(
            f"{what} is no PaLM of palm-rlhf-pytorch: expected token_emb.weight, got {got or 'nothing'}."
        )
    try:
        # Copies: what is learnt must not change the model that the state is of.
        tensors = {name: tensor.clone() for key, tensor in state.items() if (name := _renamed(key))}
        vocabulary, dim = state["token_emb.weight"].shape
        dim_head = 2 * len(state["layers.0.fn.rotary_emb.inv_freq"])
        config = {
            "dim": dim,
            "num_tokens": vocabulary,
            "depth": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers.")),
            "causal": causal,
            "dim_head": dim_head,
            "heads": state["layers.0.fn.attn_out.weight"].shape[1] // dim_head,
            "ff_mult": state["layers.0.fn.ff_out.2.weight"].shape[1] // dim,
            "qk_rmsnorm": "layers.0.fn.q_scale" in state,
            "rotary_xpos_scale_base": xpos_scale_base,
            "compat": compat,
        }
        scopes = {
            key.split(".")[1]: tensor.shape[1] for key, tensor in state.items() if key.endswith(".0.0.A")
        }
    except KeyError as error:
        reason = f"{error} is missing."
        raise CheckpointError(f"{what} does not hold palm-rlhf-pytorch's PaLM: {reason}") from error
    except (ValueError, AttributeError, TypeError, IndexError, ZeroDivisionError) as error:
        reason = _sentence(error)
        raise CheckpointError(f"{what} does not hold palm-rlhf-pytorch's PaLM: {reason}") from error
    return palm_from_state(tensors, {"config": config, "scopes": scopes}, what)


def _renamed(key: str) -> str | None:
    """Our name of a tensor of theirs; None for what is computed or tied."""
    if key == "to_logits.weight" or key.endswith(".beta") or ".rotary_emb." in key:
        return None
    for theirs, ours in ((".fn.norm.gamma", ".gamma"), ("norm.gamma", "gamma"), (".fn.", "."),
                         (".fused_attn_ff_proj.", ".fused."), (".ff_out.2.", ".ff_out.")):  # fmt: skip
        key = key.replace(theirs, ours)
    return key


def _pickled(path: Path) -> bool:
    """Whether a file begins as `torch.save` writes it, now or before 1.6, rather than as safetensors."""
    with path.open("rb") as file:
        start = file.read(9)
    # Safetensors begin with the length of their header, whose low bytes may be those of the others.
    return start[:2] in (b"PK", b"\x80\x02") and start[8:] != b"{"


def _sentence(error: Exception) -> str:
    """An error's text on one line, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " ..."


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"there is no checkpoint {path}" + (": it is a folder." if path.is_dir() else ".")
        )
    return path
