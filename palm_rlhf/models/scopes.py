"""Named adapters of peft on a model of transformers: scopes side by side on one set of weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from palm_rlhf.models.finetune import Targets, chosen, last_blocks, learned_dtype


def adapted(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Every layer with adapters of peft: its parent, its name there, and itself."""
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.lora import LoraLayer

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoraLayer):
                yield parent, name, layer


class Scopes(nn.Module):
    """What HFModel does with adapters; its `model` is that of transformers.

    A scope is a named adapter of peft, and each call says which one is active.
    """

    model: Any
    _checkpointed: bool
    # What `adapted` found; None where that may have changed.
    _found: list[tuple[nn.Module, str, Any]] | None

    def _adapters(self) -> list[tuple[nn.Module, str, Any]]:
        if self._found is None:
            self._found = list(adapted(self.model))
        return self._found

    @property
    def scopes(self) -> tuple[str, ...]:
        """The names of its adapters."""
        return tuple(dict.fromkeys(name for _, _, layer in self._adapters() for name in layer.lora_A))

    def projections(self, last_layers: int | None = None) -> dict[str, str]:
        """Names of the linear maps in the layers, to their kind: "attention" or "mlp"."""
        from transformers.pytorch_utils import Conv1D

        blocks = {id(m) for block in last_blocks(self, last_layers) for m in block.modules()}
        found = {}
        for name, module in self.model.named_modules():
            if id(module) in blocks and isinstance(module, (nn.Linear, Conv1D)) and ".lora_" not in name:
                inside = any(word in part for part in name.split(".")[:-1] for word in ("attn", "attention"))
                found[name.removesuffix(".base_layer")] = "attention" if inside else "mlp"
        return found

    def add_finetune_params(
        self,
        scope: str,
        lora_r: int = 8,
        targets: Targets = "attention",
        last_layers: int | None = None,
        alpha: float | None = None,
    ) -> None:
        """Adds adapters that change nothing yet.

        Args:
            scope: their name. lora_r: their rank.
            targets: the projections that get one: "attention", "mlp", "all", or ends of module names such as
                "q_proj".
            last_layers: only in so many of the last layers.
            alpha: what they add is scaled by alpha over the rank; by default by 1.

        Raises:
            ValueError: the scope exists, the rank is below 1, or there are no such projections.
            ModuleNotFoundError: peft is not installed.
        """
        from peft import LoraConfig, inject_adapter_in_model

        if scope in self.scopes:
            raise ValueError(f"HFModel: there are adapters {scope!r} already. Remove or merge them first.")
        if lora_r < 1 or not scope.isidentifier():
            raise ValueError(
                f"HFModel: adapters need a rank of at least 1 and a name of letters, got {lora_r}, {scope!r}"
            )
        wanted = chosen(self.projections(last_layers), targets, type(self.model).__name__)
        learns = {id(parameter): parameter.requires_grad for parameter in self.parameters()}
        alpha = lora_r if alpha is None else alpha
        config = LoraConfig(r=lora_r, lora_alpha=alpha, lora_dropout=0.0, target_modules=wanted)
        with warnings.catch_warnings():
            # Several scopes are the point, and of the layout of a Conv1D peft finds out by itself.
            warnings.filterwarnings("ignore", "Already found a `peft_config`|fan_in_fan_out is set")
            inject_adapter_in_model(config, self.model, scope)
        self._found = None
        for parameter in self.finetune_parameters(scope):
            parameter.data = parameter.data.to(learned_dtype(parameter))
        # peft freezes everything else; what learns is the trainer's to say.
        for parameter in self.parameters():
            parameter.requires_grad_(learns.get(id(parameter), True))

    def adapter_options(self, scope: str) -> dict[str, Any]:
        """The arguments of `add_finetune_params` that make adapters such as these."""
        self._known(scope)
        config = self.model.peft_config[scope]
        return {"lora_r": config.r, "targets": sorted(config.target_modules), "alpha": config.lora_alpha}

    def finetune_parameters(self, scope: str) -> Iterator[nn.Parameter]:
        """Those of one scope's adapters."""
        self._known(scope)
        for _, _, layer in self._adapters():
            for parts in (layer.lora_A, layer.lora_B):
                if scope in parts:
                    yield from parts[scope].parameters()

    def remove_finetune_params(self, scope: str) -> None:
        """Takes adapters out."""
        self._known(scope)
        for parent, name, layer in self._adapters():
            if scope in layer.lora_A:
                layer._active_adapter = []  # peft would choose another one, and say so
                layer.delete_adapter(scope)
            if not len(layer.lora_A):
                setattr(parent, name, layer.get_base_layer())
        self._found = None
        self.model.peft_config.pop(scope)
        if not self.model.peft_config:
            del self.model.peft_config

    @torch.no_grad()
    def merge_finetune_params(self, scope: str) -> None:
        """Adds adapters to the weights and removes them."""
        self._known(scope)
        for _, _, layer in self._adapters():
            if scope in layer.lora_A:
                layer.get_base_layer().weight.add_(layer.get_delta_weight(scope))
        self.remove_finetune_params(scope)

    def checkpoint_layers(self) -> Any:
        """Keeps what goes into a layer, not what is in it: less memory, and in the backward one more forward.

        ValueError for a model that transformers cannot do this with.
        """
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise ValueError(f"{type(self.model).__name__} cannot compute its layers again in the backward")
        name = "activation_checkpointing_enable"  # transformers 5's; in 4 it has another one
        enable = getattr(self.model, name, None) or self.model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": self._again})
        self._checkpointed = True
        return self

    def _again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a layer's forward and of its repetition, when other adapters may be in use."""
        active = next((layer._active_adapter for _, _, layer in self._adapters()), [])
        return nullcontext(), self._with_active(active)

    @contextmanager
    def _with_active(self, active: list[str]) -> Iterator[None]:
        layers = [layer for _, _, layer in self._adapters()]
        before = [layer._active_adapter for layer in layers]
        for layer in layers:
            layer._active_adapter = active
        try:
            yield
        finally:
            for layer, own in zip(layers, before):
                layer._active_adapter = own

    def _known(self, scope: str | None) -> None:
        if scope is not None and scope not in (there := self.scopes):
            listed = ", ".join(map(repr, there)) or "none"
            raise ValueError(
                f"HFModel: there are no adapters {scope!r}, only {listed}. Add them by add_finetune_params()."
            )

    def _use(self, scope: str | None) -> None:
        """Makes one scope's adapters, or none, the active ones."""
        # Not peft's set_adapter(), which chooses what learns as well.
        self._known(scope)
        for _, _, layer in self._adapters():
            layer._active_adapter = [] if scope is None else [scope]
