"""Reward models in files: safetensors of our own, and checkpoints of palm-rlhf-pytorch."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_rlhf.models.checkpoint import (
    CheckpointError,
    backbone_from_state,
    backbone_metadata,
    from_upstream,
    read_tensors,
    unshared,
    write_tensors,
)
from palm_rlhf.rewards.model import Pooling, RewardModel

KIND = "RewardModel"


def save_reward_model(path: str | Path, model: RewardModel, **metadata: Any) -> Path:
    """Writes backbone, adapters, head and normalisation as safetensors; `metadata` is what JSON holds."""
    backbone = backbone_metadata(model.palm)
    options = {
        "dropout": model.dropout,
        "num_binned_output": model.to_pred.out_features if model.binned_output else 0,
        "sample_from_bins": model.sample_from_bins,
        "sample_temperature": model.sample_temperature,
        "pooling": model.pooling,
    }
    own = {"kind": KIND, **backbone, "scope": model.reward_lora_scope, "options": options}
    return write_tensors(path, unshared(model), {**own, **metadata})


def load_reward_model(
    path: str | Path, *, device: str | torch.device = "cpu", **upstream: Any
) -> RewardModel:
    """A RewardModel from a file of ours, or of palm-rlhf-pytorch: `torch.save(model.state_dict(), path)`.

    Args:
        path: the file. Pickles are read with `weights_only=True`: a checkpoint cannot run code.
        device: where to put it.
        upstream: what a foreign file does not say, as in `reward_from_upstream`; a file of ours says it.

    Raises:
        CheckpointError: no such file, no checkpoint, or not of a RewardModel.
    """
    path = Path(path)
    if _pickled(path):
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint of plain tensors: {reason}"
            ) from error
        return reward_from_upstream(state, what=str(path), **upstream)
    tensors, metadata = read_tensors(path, device)
    if metadata.get("kind") != KIND:
        raise CheckpointError(f"{path} holds a {metadata.get('kind')}, expected a {KIND}.")
    if missing := [name for name in ("scopes", "options") if name not in metadata]:
        raise CheckpointError(f"{path} does not hold a {KIND}: {missing[0]} is missing.")
    # Copies, whose memory is aligned as PyTorch's own: in the file a tensor may begin anywhere, and products
    # with it then round otherwise.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    palm = backbone_from_state(_palm_part(tensors), metadata, str(path)).to(device)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("palm.")}
    return _assembled(palm, metadata.get("scope"), rest, metadata["options"], str(path))


def reward_from_upstream(
    state: Mapping[str, Tensor],
    *,
    reward_lora_scope: str | None = "reward",
    pooling: Pooling = "mean",
    dropout: float = 0.1,
    what: str = "the state",
    **palm: Any,
) -> RewardModel:
    """A RewardModel with the weights of a `palm_rlhf_pytorch.RewardModel.state_dict()`.

    Args:
        state: of a reward model for numbers or bins, with adapters or without.
        reward_lora_scope: which adapters are the reward's; None, or a state without any: none.
        pooling: `mean` is theirs, and gives the same predictions.
        dropout: in training.
        what: the state's name in errors.
        palm: `causal`, `xpos_scale_base`, `compat`, as in `models.checkpoint.from_upstream`.

    Raises:
        CheckpointError: it is no such state, or has adapters, but none of that name.
    """
    head = (
        "to_pred.0.weight" if isinstance(state, Mapping) and "to_pred.0.weight" in state else "to_pred.weight"
    )
    for needed in (head, "prompt_embed", "response_embed"):
        if not isinstance(state, Mapping) or needed not in state:
            raise CheckpointError(
                f"{what} does not hold palm-rlhf-pytorch's RewardModel: {needed} is missing."
            )
    backbone = from_upstream(_palm_part(state), what=what, **palm)
    scopes = list(backbone.scopes)
    if scopes and reward_lora_scope is not None and reward_lora_scope not in scopes:
        raise CheckpointError(
            f"{what} has the adapters {', '.join(map(repr, scopes))}, expected {reward_lora_scope!r}. "
            "Name those of the reward with reward_lora_scope, or None for none."
        )
    weight = state[head]
    one = torch.ones((), device=weight.device)
    rest = {
        "prompt_embed": state["prompt_embed"],
        "response_embed": state["response_embed"],
        "to_pred.weight": weight,
        "to_pred.bias": state.get("to_pred.bias", weight.new_zeros(len(weight))),
        "gain": one,
        "offset": torch.zeros_like(one),
    }
    bins = len(weight) if head == "to_pred.weight" else 0
    options = {"dropout": dropout, "num_binned_output": bins, "pooling": pooling}
    return _assembled(backbone, reward_lora_scope if scopes else None, rest, options, what)


def _assembled(
    palm: Any, scope: str | None, rest: Mapping[str, Tensor], options: Mapping[str, Any], what: str
) -> RewardModel:
    """A reward model on this backbone, with the adapters of that scope, and these tensors."""
    try:
        adapters, how = {}, {}
        if scope is not None:
            ids = {id(parameter) for parameter in palm.finetune_parameters(scope)}
            adapters = {f"palm.{name}": p.data for name, p in palm.named_parameters() if id(p) in ids}
            how = palm.adapter_options(scope)
            how |= {f"lora_{name}": how.pop(name) for name in ("targets", "alpha")}
            palm.remove_finetune_params(scope)
        model = RewardModel(
            palm, use_lora=scope is not None, reward_lora_scope=scope or "", share=True, **how, **options
        )
        result = model.load_state_dict({**rest, **adapters}, strict=False, assign=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{what} does not hold a {KIND}: {' '.join(str(error).split())}") from error
    odd = [*result.unexpected_keys, *(name for name in result.missing_keys if not name.startswith("palm."))]
    if odd:
        raise CheckpointError(f"{what} does not hold a {KIND}: {odd[0]} is on one side only.")
    return model


def _palm_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("palm."): tensor for name, tensor in state.items() if name.startswith("palm.")}


def _pickled(path: Path) -> bool:
    """Whether it begins as what `torch.save` writes; not where there is no file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")
