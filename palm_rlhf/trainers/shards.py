"""Models in shards: PyTorch's FSDP2, each process with its part of the weights, gradients and optimizers.

Every block is gathered when it is computed, forward and backward, and let go after it; embeddings, last norm
and head stay from a forward pass to the end of its backward. Adapters, value and reward heads are whole in
every process.
"""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from palm_rlhf.trainers.ranks import Launched, Part

# By which trainers enter a model.
_FORWARD = ("hidden_states", "packed_hidden_states")
# What accelerate passes on of its configuration, and the values of it that this does not do.
_UNSUPPORTED = {
    "FSDP_VERSION": (("", "1"), "models in shards are those of FSDP2: the launch needs fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": (("true", "1"), "fsdp_offload_params of the launch is not supported"),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        ("true", "1"),
        "fsdp_activation_checkpointing of the launch is not supported",
    ),
}


class Sharded(Launched):
    """One of several that hold a part of each model."""

    sharded = True

    def __init__(self) -> None:
        """Joins the others.

        Raises:
            ModuleNotFoundError: accelerate is not installed.
            ValueError: the launch asks for a kind of shards that there is not.
        """
        for name, (values, sentence) in _UNSUPPORTED.items():
            if os.environ.get(name, "").lower() in values:
                raise ValueError(f"{sentence}. Launch with examples/accelerate/fsdp2.yaml.")
        super().__init__()
        # What a model returns is read: nothing is written into a view of it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self._mesh = init_device_mesh(self.state.device.type, (self.count,))
        # Of every model that was cut: its modules without weights.
        self._shapes: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()

    def cut(self, *models: nn.Module | None) -> None:
        """As of one.

        ValueError for layers that are computed again in the backward, and for weights that learn in two.
        """
        models = tuple({id(model): model for model in models if model is not None}.values())
        learn = [id(p) for model in models for p in model.parameters() if p.requires_grad]
        if len(learn) > len(set(learn)):
            raise ValueError("models in shards cannot share weights that learn. Copy one of them.")
        reshard = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        for model in models:
            if model in self._shapes:
                continue
            if getattr(model, "_checkpointed", False):
                raise ValueError(
                    "--checkpoint-layers does not go with models in shards. Leave one of them out."
                )
            self._shapes[model] = _without_weights(model)
            scopes = getattr(model, "scopes", ())
            adapters = {parameter for scope in scopes for parameter in model.finetune_parameters(scope)}
            for part in (*model.blocks, model):
                # The root stays: the head is used behind the forward pass that it belongs to.
                again = reshard and part is not model
                fully_shard(part, mesh=self._mesh, reshard_after_forward=again, ignored_params=adapters)
                # Gradients are sums, and gloo knows no other.
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
            for name in _FORWARD:
                if hasattr(model, name):
                    register_fsdp_forward_method(model, name)

    @torch.no_grad()
    def whole(self, module: nn.Module) -> nn.Module:
        """As of one: a copy, which has no part in the training."""
        memo = {id(part): self._filled(part) for part in module.modules() if part in self._shapes}
        return copy.deepcopy(module, memo) if memo else module

    def _filled(self, model: nn.Module) -> nn.Module:
        filled = copy.deepcopy(self._shapes[model])
        _let_go(model)
        own = dict(model.named_parameters(remove_duplicate=False))
        found: dict[int, nn.Parameter] = {}  # tied weights stay so
        for name, shape in list(filled.named_parameters(remove_duplicate=False)):
            tensor = own[name]
            if id(tensor) not in found:
                found[id(tensor)] = nn.Parameter(_gathered(tensor), requires_grad=shape.requires_grad)
            parent, _, leaf = name.rpartition(".")
            setattr(filled.get_submodule(parent), leaf, found[id(tensor)])
        return filled.train(model.training)

    def gathered(self, tensors: Mapping[Any, Any]) -> dict[Any, Any]:
        """As of one; one after the other, in an order that is the same everywhere, as that of sets is not."""
        found = {}
        for name in sorted(tensors, key=str):
            whole = _gathered(tensors[name])
            if self.main:
                found[name] = whole.cpu() if isinstance(tensors[name], DTensor) else whole
        return found

    def part_of(self, whole: Tensor, like: Tensor) -> Tensor:
        """As of one."""
        if not isinstance(like, DTensor) or whole.shape != like.shape:
            return whole
        whole = whole.to(like.device)
        # Every process has read the same: nothing is sent.
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)

    def in_step(self, parts: Iterable[Part], spare: Callable[[], Part]) -> Iterator[tuple[Part, bool]]:
        """As of one. A forward pass gathers what all have, so all have to make as many."""
        own = list(parts)
        missing = max(self.everyones(len(own))) - len(own)
        yield from ((part, True) for part in own)
        for _ in range(missing):
            yield spare(), False

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """As of one; shards have been added up in the backward."""
        super().sum([tensor for tensor in tensors if not isinstance(tensor, DTensor)])

    @torch.no_grad()
    def clipped(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """As of one, over shards and what is whole together."""
        there = [parameter.grad for parameter in parameters if parameter.grad is not None]
        shards = [grad.to_local() for grad in there if isinstance(grad, DTensor)]
        whole = [grad for grad in there if not isinstance(grad, DTensor)]
        if not there:
            return 0.0
        square = nn.utils.get_total_norm(shards).to(there[0].device, there[0].dtype).square()
        super().sum([square])
        norm = (square + nn.utils.get_total_norm(whole).to(square).square()).sqrt()
        # As torch.nn.utils.clip_grad_norm_.
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        for grad in (*shards, *whole):
            grad.mul_(factor)
        return float(norm)


def _gathered(tensor: Any) -> Any:
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def _let_go(model: nn.Module) -> None:
    """Of what a forward pass without a backward has left: parameters are shards again."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on no device, tied where they are; buffers are shared."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    return copy.deepcopy(model, memo)
