"""Causal language models of Hugging Face transformers as policies, references, critics and reward models."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf.models.protocol import Head
from palm_rlhf.models.scopes import Scopes, adapted

# Numbers of a configuration that logits may be multiplied or divided by, and the limit that they may have.
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")
_SOFTCAP = "final_logit_softcapping"
# How far from transformers' own results the same model may be, relative to their size.
_EXACT, _ROUNDED = 1e-4, 5e-2


class HFCache:
    """Keys and values in a cache of transformers, and which of its slots hold tokens."""

    def __init__(self, past: Any) -> None:
        """`past` is an empty DynamicCache or StaticCache."""
        self.past, self.length = past, 0
        # [B, length], or None as long as every slot holds a token.
        self.mask: Tensor | None = None

    def extend(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """Claims slots for new tokens [B, T]; the mask [B, length] of all so far, or None without padding."""
        batch, steps = tokens.shape
        if self.mask is not None or mask is not None:
            before, new = (
                torch.ones(batch, width, dtype=torch.bool, device=tokens.device) if part is None else part
                for part, width in ((self.mask, self.length), (mask, steps))
            )
            self.mask = torch.cat([before, new.bool()], dim=1)
        self.length += steps
        return self.mask

    def keep(self, rows: Tensor) -> None:
        """Drops all other rows of the batch; `rows` are indices."""
        self.past.reorder_cache(rows)
        self.mask = None if self.mask is None else self.mask[rows]


class HFModel(Scopes):
    """A `CausalModel` that is a `PreTrainedModel`, with named adapters of peft as its scopes.

    Positions count real tokens, so that padding on the left moves nothing. A factor of the logits (Granite,
    Cohere, Falcon-H1) is folded into the hidden states and a limit (Gemma 2) into the head. Whether that is
    all the model does is tried at construction: what cannot be expressed is refused, not approximated.

    Attributes:
        model: the model of transformers.
        dim, num_tokens, max_length: E, V, and `max_position_embeddings` where there is such a bound.
        scale: what hidden states are multiplied by.
    """

    def __init__(self, model: Any, *, static_cache: bool = False, check: bool = True) -> None:
        """
        Args:
            model: of `AutoModelForCausalLM`; it is used as it is, not copied.
            static_cache: generate with a cache of fixed size, as compiled models need it; else it grows.
            check: run five tokens to compare with transformers' own logits, with padding and cached.

        Raises:
            TypeError: it is no causal language model of transformers.
            ValueError: its logits are no product of hidden states and one matrix, or padding on the left
                changes what it finds.
        """
        super().__init__()
        kind = type(model).__name__
        for name in ("base_model", "get_output_embeddings", "config"):
            if not hasattr(model, name):
                raise TypeError(f"HFModel: expected a causal model of transformers, got {kind}")
        weight = getattr(model.get_output_embeddings(), "weight", None)
        if model.base_model is model or weight is None or weight.dim() != 2:
            raise TypeError(
                f"HFModel: {kind} has no decoder with one matrix to the vocabulary behind it. Load it by "
                "AutoModelForCausalLM."
            )
        if getattr(model, "is_quantized", False):
            raise ValueError(f"HFModel: {kind} has quantised weights: no adapter can be merged into them")
        self.model, self.static_cache = model, static_cache
        self.num_tokens, self.dim = weight.shape
        config = model.config.get_text_config(decoder=True)
        self.max_length = getattr(config, "max_position_embeddings", None)
        self.scale, self._softcap = 1.0, getattr(config, _SOFTCAP, None)
        self._dropout: dict[str, float] = {}
        self._checkpointed, self._found = False, None
        # Its name from transformers 5.24 on; before, `cache` is no parameter of a decoder.
        names = inspect.signature(model.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        if check:
            self._check(config)

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.head.weight.device

    @property
    def head(self) -> Head:
        """The output embeddings; a bias is scaled as the hidden states are."""
        found = self.model.get_output_embeddings()
        bias = getattr(found, "bias", None)
        if bias is not None and self.scale != 1:
            bias = bias * self.scale
        return Head(found.weight, bias, self._softcap)

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's layers, the first one first; ValueError where they cannot be told."""
        depth = getattr(self.model.config.get_text_config(decoder=True), "num_hidden_layers", None)
        for module in self.model.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return list(module)
        raise ValueError(f"HFModel: the layers of {type(self.model).__name__} cannot be told apart")

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        scope: str | None = None,
        cache: HFCache | None = None,
        extra_embed: Tensor | None = None,
    ) -> Tensor:
        """[B, T, E] after the last norm: see `models.protocol.CausalModel`."""
        self._use(scope)
        if self._checkpointed:
            # The flag of the layer alone decides; what is in it keeps its mode, and so its dropout.
            for block in self.blocks:
                block.training = torch.is_grad_enabled() and cache is None
        options: dict[str, Any] = {"use_cache": cache is not None}
        if extra_embed is None:
            options["input_ids"] = tokens
        else:
            options["inputs_embeds"] = self.model.get_input_embeddings()(tokens) + extra_embed
        if cache is not None:
            mask = cache.extend(tokens, mask)
            options[self._cache_name] = cache.past
        if mask is not None:
            places = (mask.long().cumsum(1) - 1).clamp(min=0)
            options |= {"attention_mask": mask.long(), "position_ids": places[:, -tokens.shape[1] :]}
        found = self.model.base_model(**options).last_hidden_state
        return found if self.scale == 1 else found * self.scale

    def new_cache(self, batch: int, capacity: int) -> HFCache:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        from transformers import DynamicCache, StaticCache

        if self.static_cache:
            return HFCache(StaticCache(config=self.model.config, max_cache_len=capacity))
        return HFCache(DynamicCache(config=self.model.config))

    @torch.no_grad()
    def for_sampling(self, scope: str | None = None) -> HFModel:
        """This model in evaluation mode with one scope's adapters merged; the other weights are shared."""
        self._known(scope)
        shared = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        twin = copy.deepcopy(self, shared)
        for parent, name, layer in adapted(twin.model):
            base = layer.get_base_layer()
            if scope in layer.lora_A:
                merged = base.weight + layer.get_delta_weight(scope).to(base.weight.dtype)
                base.weight = nn.Parameter(merged, requires_grad=False)
            setattr(parent, name, base)
        vars(twin.model).pop("peft_config", None)
        twin._found = None
        return twin.eval()

    def configuration(self) -> dict[str, Any]:
        """What `hf_from_configuration` makes a model of this kind again from, as JSON holds it."""
        dtype = str(self.head.weight.dtype).removeprefix("torch.")
        return {"config": json.loads(self.model.config.to_json_string()), "dtype": dtype, "scale": self.scale}

    def set_dropout(self, dropout: float) -> HFModel:
        """All dropout there is: of modules, of attention, of what the configuration says."""
        config = self.model.config.get_text_config(decoder=True)
        for owner in (config, *self.model.modules()):
            for name, value in list(vars(owner).items()):
                if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                    if owner is config:
                        self._dropout.setdefault(name, value)
                    setattr(owner, name, dropout)
            if isinstance(owner, nn.Dropout):
                owner.p = dropout
        return self

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the model as transformers does, aside and renamed; ValueError where it has adapters."""
        if self.scopes:
            raise ValueError(
                f"HFModel: merge or remove the adapters {', '.join(self.scopes)} before the model is saved"
            )
        folder = Path(folder)
        aside, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
        for leftover in (aside, old):
            shutil.rmtree(leftover, ignore_errors=True)
        config = self.model.config.get_text_config(decoder=True)
        now = {name: getattr(config, name) for name in self._dropout}
        try:
            vars(config).update(self._dropout)  # as it came
            with quiet():
                self.model.save_pretrained(aside)
        finally:
            vars(config).update(now)
        if folder.exists():
            folder.replace(old)
        aside.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder

    @torch.no_grad()
    def _check(self, config: Any) -> None:
        """Finds the factor of the logits; ValueError where they, padding or the cache are not as expected."""
        if any(parameter.is_meta for parameter in self.model.parameters()):
            return
        name, modes = type(self.model).__name__, [(m, m.training) for m in self.modules()]
        self.eval()
        try:
            self._find_scale(config, name)
            self._check_padding(name)
        except (RuntimeError, TypeError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"HFModel: {name} does not run with padding on the left and a cache, as it must: {reason}"
            ) from error
        finally:
            for module, training in modes:
                module.training = training

    def _tokens(self) -> Tensor:
        return (torch.arange(1, 6, device=self.device) * 7 % self.num_tokens)[None]

    def _find_scale(self, config: Any, name: str) -> None:
        tokens = self._tokens()
        expected = self.model(input_ids=tokens, use_cache=False).logits.double()
        hidden = self.hidden_states(tokens)
        there = [float(value) for key in _FACTORS if (value := getattr(config, key, None))]
        for self.scale in (1.0, *there, *(1 / value for value in there)):
            logits = F.linear(hidden * self.scale, *self.head[:2]).double()
            if self._softcap is not None:
                logits = self._softcap * torch.tanh(logits / self._softcap)
            if logits.shape == expected.shape and self._close(logits, expected):
                return
        raise ValueError(
            f"HFModel: the logits of {name} are not its last hidden states times its output embeddings, nor "
            f"with a factor ({', '.join(_FACTORS)}) or {_SOFTCAP}: it cannot be trained here"
        )

    def _check_padding(self, name: str) -> None:
        tokens = self._tokens()
        both = torch.cat([tokens, torch.cat([tokens[:, :2], tokens[:, :3]], dim=1)])
        mask = torch.tensor([[True] * 5, [False] * 2 + [True] * 3], device=self.device)
        expected = self.hidden_states(tokens)[0]
        whole, cache = self.hidden_states(both, mask=mask), self.new_cache(2, 5)
        parts = [self.hidden_states(both[:, :3], mask=mask[:, :3], cache=cache)]
        parts.append(self.hidden_states(both[:, 3:], cache=cache))
        for what, found in (("padding on the left", whole), ("its cache", torch.cat(parts, dim=1))):
            if not (self._close(found[0], expected) and self._close(found[1, 2:], expected[:3])):
                raise ValueError(
                    f"HFModel: {what} changes what {name} finds: it cannot be trained here on what it samples"
                )

    def _close(self, found: Tensor, expected: Tensor) -> bool:
        exact = next(self.model.parameters()).dtype in (torch.float32, torch.float64)
        difference = (found.double() - expected.double()).norm() / expected.double().norm()
        return bool(difference <= (_EXACT if exact else _ROUNDED))


def hf_from_configuration(configuration: Mapping[str, Any]) -> HFModel:
    """A model with weights of no meaning, to be loaded into; see `HFModel.configuration`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**configuration["config"])
    made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, configuration["dtype"]))
    model = HFModel(made, check=False)
    model.scale = configuration["scale"]
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers for models that are read or written at once."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_hf(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    patch: bool | Iterable[str] = False,
    static_cache: bool = False,
    checkpoint_layers: bool = False,
    **options: Any,
) -> HFModel:
    """A causal language model by its name on the hub or the path of its folder.

    Args:
        name: such as "Qwen/Qwen2.5-0.5B". device: where to put it.
        dtype: of the weights; float32 by default, which training needs without a copy in higher precision.
        patch: put `rlhf_kernels.patch` on this model, or on what is named; it stays as long as the model.
        static_cache, checkpoint_layers: see HFModel.
        options: of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: there is no such model, or it cannot be expressed; see HFModel.
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers import AutoModelForCausalLM

    if not str(name):
        raise ValueError("a model of transformers needs a name on the hub, or a folder: got none")
    if str(name).startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(f"there is no folder {name} with a model of transformers")
    try:
        with quiet():
            model, found = AutoModelForCausalLM.from_pretrained(
                str(name), dtype=dtype, output_loading_info=True, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be loaded as a causal model of transformers: {reason}") from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name} is no whole {type(model).__name__}: {len(missing)} weights are missing, such as "
            f"{missing[0]}, and would be random"
        )
    model = model.to(device)
    if patch:
        import rlhf_kernels

        rlhf_kernels.patch(model, only=None if patch is True else list(patch))
    made = HFModel(model.eval(), static_cache=static_cache)
    return made.checkpoint_layers() if checkpoint_layers else made
