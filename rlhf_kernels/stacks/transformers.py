"""Hugging Face transformers: norms, rotary embeddings, gates, the loss and attention of causal models.

Attention goes through the library's own registries (`AttentionInterface`, `AttentionMaskInterface`), the rest
by rebinding a module's function or a class's `forward`. A model takes the same replacements for itself alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from rlhf_kernels.stacks import rebind
from rlhf_kernels.stacks.peer import Peer
from rlhf_kernels.stacks.rebind import Call, Rebinding, Target

# family -> the prefix of its classes
FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gpt_neox": "GPTNeoX",
    "phi": "Phi",
}
NORMS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
GATED = ("llama", "mistral", "qwen2", "qwen3")


def modeling(family: str) -> str:
    """The module that holds a family's classes."""
    return f"transformers.models.{family}.modeling_{family}"


def _rms_norm() -> Callable[..., Tensor]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, **_: Any) -> Tensor:
        return LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=eps), x)

    return rms_norm


PEERS = [
    Peer(
        stack="transformers",
        op="rms_norm",
        label="transformers",
        package="transformers",
        origin="transformers.models.llama.modeling_llama.LlamaRMSNorm.forward",
        adapter=_rms_norm,
        options=frozenset({"eps"}),
        note="rounds before it multiplies by the weight",
    ),
]


def _our_rms_norm(original: Any) -> Any:
    from rlhf_kernels import rms_norm

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != self.weight.dtype or not rebind.floats(hidden_states):
            return original(self, hidden_states)
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)

    return forward


def _our_gemma_norm(original: Any) -> Any:
    from rlhf_kernels import rms_norm

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype or not rebind.floats(x):
            return original(self, x)
        return rms_norm(x, self.weight, eps=self.eps, weight_offset=1.0)

    return forward


def _our_rotary(original: Any, partial_head: bool = False) -> Any:
    from rlhf_kernels import RotaryTable, rotary

    def turned(x: Tensor, tables: RotaryTable, width: int) -> Tensor:
        if width == x.shape[-1]:
            return rotary(x, tables)
        return torch.cat([rotary(x[..., :width], tables), x[..., width:]], dim=-1)

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """transformers': cos and sin [B, T, D], the same numbers in both halves; arithmetic in float32."""
        width = cos.shape[-1]
        fits = (
            unsqueeze_dim == 1
            and cos.dim() == 3
            and q.dim() == k.dim() == 4
            and cos.shape[0] in (1, q.shape[0])
            and cos.shape[1] == q.shape[2] == k.shape[2]
            and (width == q.shape[-1] or (partial_head and width < q.shape[-1]))
        )
        if not fits or cos.requires_grad or not q.dtype == k.dtype == cos.dtype:
            return original(q, k, cos, sin, unsqueeze_dim)
        half = [table[..., : width // 2].float() for table in (cos, sin)]
        tables = RotaryTable(*(table[0] if table.shape[0] == 1 else table for table in half))
        return turned(q, tables, width), turned(k, tables, width)

    return apply_rotary_pos_emb


def _our_mlp(original: Any) -> Any:
    from rlhf_kernels import swiglu

    def forward(self: Any, x: Tensor) -> Tensor:
        if getattr(self.config, "hidden_act", None) not in ("silu", "swish"):
            return original(self, x)
        return self.down_proj(swiglu(self.up_proj(x), self.gate_proj(x)))

    return forward


def _our_loss(original: Any) -> Any:
    from rlhf_kernels import logprob

    def ForCausalLMLoss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """transformers': the mean over labels that count, or their sum over `num_items_in_batch`."""
        if not rebind.floats(logits) or logits.dtype is torch.float64:  # the original rounds it to float32
            return original(
                logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
            )
        if shift_labels is None:
            labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)
            shift_labels = labels[..., 1:]
        target = shift_labels.reshape(-1).to(logits.device)
        real = target != ignore_index
        found, _ = logprob(logits.reshape(-1, vocab_size), target.masked_fill(~real, 0))
        total = -found.masked_fill(~real, 0.0).sum()
        if num_items_in_batch is None:
            return total / real.sum()
        if torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(total.device)
        return total / num_items_in_batch

    return ForCausalLMLoss


# What transformers passes on to attention that ours does not know; None or False means that it is not used.
_FOREIGN = (
    "softcap",
    "sliding_window",
    "position_bias",
    "s_aux",
    "cache",
    "output_attentions",
    "cu_seq_lens_q",
)


def our_attention(original: Any) -> Any:
    """An attention function for AttentionInterface; what ours does not know goes to the original."""
    from rlhf_kernels import attention

    def rlhf_kernels_attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        whole = query.shape[2] == key.shape[2] or not causal or query.shape[2] == 1
        key_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        plain = (
            dropout == 0.0
            and position_bias is None
            and cache is None
            and not any(kwargs.get(name) for name in _FOREIGN)
            and (key_mask is not None or (attention_mask is None and whole))
            and query.shape[-1] == value.shape[-1]
        )
        if plain:
            out = attention(query, key, value, causal=bool(causal), key_mask=key_mask, scale=scaling)
            return out.transpose(1, 2).contiguous(), None
        if key_mask is not None:
            attention_mask = _four_dimensions(key_mask, query.shape[2], bool(causal))
        rest = (attention_mask, dropout, scaling, is_causal, position_bias, cache)
        return original(module, query, key, value, *rest, **kwargs)

    return rlhf_kernels_attention


def _four_dimensions(key_mask: Tensor, queries: int, causal: bool) -> Tensor:
    """[B, S] as [B, 1, T, S], causal to the bottom right, for the original."""
    keys = key_mask.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=key_mask.device)
    seen = seen.tril(keys - queries) if causal else seen
    return key_mask[:, None, None, :] & seen


def our_mask(original: Any) -> Any:
    """A mask function for AttentionMaskInterface: [B, S] for ours where causality is all there is besides."""
    from transformers.masking_utils import causal_mask_function

    def rlhf_kernels_mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: Any = 0,
        mask_function: Any = causal_mask_function,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        allow_is_bidirectional_skip: bool = False,
        use_vmap: bool = False,
        device: Any = "cpu",
        **kwargs: Any,
    ) -> Tensor | None:
        simple = (
            isinstance(attention_mask, Tensor)
            and attention_mask.shape == (batch_size, kv_length)
            and mask_function is causal_mask_function
            and local_size is None
            and not use_vmap
            and kv_offset == 0
            and isinstance(q_offset, int)
            and q_offset + q_length == kv_length
        )
        if simple:
            return attention_mask.bool()
        return original(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
            allow_is_causal_skip, allow_is_bidirectional_skip, use_vmap, device, **kwargs,
        )  # fmt: skip

    return rlhf_kernels_mask


def configuration(family: str, large: bool = False, **options: Any) -> Any:
    """A small random configuration of a family: 2 layers, grouped heads where the family has them."""
    import transformers

    size = (256, 512, 4, 2048) if large else (16, 24, 4, 97)
    settings = dict(zip(("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"), size))
    settings |= {"num_hidden_layers": 2, "max_position_embeddings": 512, "pad_token_id": 0}
    if family != "gpt_neox":
        settings["num_key_value_heads"] = 2
    if family in ("gemma", "qwen3"):
        settings["head_dim"] = settings["hidden_size"] // 4
    settings |= {"bos_token_id": 1, "eos_token_id": 2, **options}
    return getattr(transformers, f"{FAMILIES[family]}Config")(**settings)


def _module_call(family: str, name: str, large: bool) -> Call:
    from importlib import import_module

    cls = getattr(import_module(modeling(family)), f"{FAMILIES[family]}{name}")
    config = configuration(family, large)
    width = config.hidden_size
    torch.manual_seed(0)
    module = cls(config) if name == "MLP" else cls(width, eps=1e-6)
    if name != "MLP":
        torch.nn.init.normal_(module.weight)
    return Call((module, torch.randn(4, 256 if large else 9, width).requires_grad_()))


def _rotary_call(family: str, large: bool) -> Call:
    batch, heads, time, size = (2, 8, 256, 64) if large else (3, 4, 11, 8)
    width = size // 4 if family == "gpt_neox" else size
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(batch, time, heads, size, generator=draw).requires_grad_()
    k = torch.randn(batch, time, heads // 2, size, generator=draw).requires_grad_()
    positions = torch.arange(time)[None] - torch.arange(batch)[:, None]  # as left padding makes them
    angles = positions.clamp(min=0)[..., None] * 0.5 ** torch.arange(width // 2)
    angles = torch.cat([angles, angles], dim=-1)

    def invoke(function: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return function(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    return Call((q, k, angles.cos(), angles.sin()), {}, invoke)


def _loss_call(large: bool) -> Call:
    logits, labels = rebind.logits_and_labels(large)
    labels[:, :2] = -100  # a prompt, or padding on the left
    return Call((logits, labels, logits.shape[-1]))


def _attention_call(large: bool) -> Call:
    batch, heads, time, size = (2, 8, 256, 64) if large else (2, 4, 11, 8)
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, time, size, generator=draw).requires_grad_()
    k, v = (torch.randn(batch, heads // 2, time, size, generator=draw).requires_grad_() for _ in range(2))
    module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    return Call((module, q, k, v, None), {"scaling": 0.2})


def _mask_call(large: bool) -> Call:
    time = 512 if large else 11
    mask = torch.ones(3, time, dtype=torch.bool)
    mask[1, :4] = False

    def invoke(function: Any, mask: Tensor) -> Tensor:
        found = function(len(mask), time, time, attention_mask=mask)
        found = _four_dimensions(found, time, True) if found.dim() == 2 else found
        return found.float()[mask[:, None, :]] if found.shape[1] != 1 else found[:, 0].float()[mask]

    return Call((mask,), {}, invoke)


def _own_attention(device: str) -> str | None:
    return "on a CPU transformers' attention is PyTorch's own, as ours is" if device == "cpu" else None


def _partial_rotary(device: str) -> str | None:
    why = "a quarter of a head is turned, and joining it to the rest takes most of the time"
    return f"{why}: no faster on a CPU" if device == "cpu" else None


def _families() -> list[Rebinding]:
    found = []
    for family, prefix in FAMILIES.items():
        module = modeling(family)
        if family in NORMS:
            make = _our_gemma_norm if family == "gemma" else _our_rms_norm
            call = partial(_module_call, family, "RMSNorm")
            place = f"{module}:{prefix}RMSNorm.forward"
            note = "" if family == "gemma" else "in 16 bits rounded once, where the original rounds twice"
            found.append(Rebinding(f"{family}.rms_norm", "rms_norm", place, make, call, note=note))
        make = partial(_our_rotary, partial_head=family == "gpt_neox")
        call, place = partial(_rotary_call, family), f"{module}:apply_rotary_pos_emb"
        note = "in 16 bits the arithmetic is float32"
        leave = _partial_rotary if family == "gpt_neox" else lambda device: None
        found.append(Rebinding(f"{family}.rotary", "rotary", place, make, call, leave=leave, note=note))
        if family in GATED:
            call = partial(_module_call, family, "MLP")
            found.append(
                Rebinding(f"{family}.mlp", "swiglu", f"{module}:{prefix}MLP.forward", _our_mlp, call)
            )
    return found


_LOSSES = "transformers.loss.loss_utils"

PATCH = Target(
    name="transformers",
    package="transformers",
    root="transformers",
    checked=("5.23.0",),
    rebindings=(
        *_families(),
        Rebinding(
            name="loss",
            op="logprob",
            place=f"{_LOSSES}:ForCausalLMLoss",
            registries=(f"{_LOSSES}:LOSS_MAPPING",),
            make=_our_loss,
            call=_loss_call,
            note="the model returns its logits as before; no log-softmax of them is kept",
        ),
        Rebinding(
            name="attention",
            op="attention",
            place="transformers.modeling_utils:AttentionInterface._global_mapping.sdpa",
            make=our_attention,
            call=_attention_call,
            backends=rebind.FAST | {"torch"},
            leave=_own_attention,
            note="dropout, windows and other masks than padding go to the original",
        ),
        Rebinding(
            name="attention_mask",
            op="attention",
            place="transformers.masking_utils:AttentionMaskInterface._global_mapping.sdpa",
            make=our_mask,
            call=_mask_call,
            backends=rebind.FAST | {"torch"},
            leave=_own_attention,
            note="goes with `attention`: without it masks have four dimensions, which go to the original",
        ),
    ),
    untouched={
        "layer norms of GPT-NeoX and Phi": "torch.nn.LayerNorm is fused already",
        "the gates of Gemma": "its gate is a tanh GELU; our operator has SiLU",
        "the MLPs of GPT-NeoX and Phi": "they have no gate",
    },
)
