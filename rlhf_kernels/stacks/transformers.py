"""Hugging Face transformers: norms, rotary embeddings, gates, the loss and attention of causal models.

Attention goes through the library's own registries (`transformers_attention.py`), the rest by rebinding a
module's function or a class's `forward`. A model takes the same replacements for itself alone.
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
from rlhf_kernels.stacks.transformers_attention import ATTENTION

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
    checked=("5.23.0", "5.24.0"),
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
        *ATTENTION,
    ),
    untouched={
        "layer norms of GPT-NeoX and Phi": "torch.nn.LayerNorm is fused already",
        "the gates of Gemma": "its gate is a tanh GELU; our operator has SiLU",
        "the MLPs of GPT-NeoX and Phi": "they have no gate",
    },
)
