"""palm-rlhf-pytorch's `PaLM.generate` with a cache of keys and values.

The same arguments, the same random numbers in the same order, hence the same tokens but for rounding. Rotary
positions with xPos are exact under a cache: the centre of the scales cancels between query and key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Layer:
    """One block with its adapters merged, and the keys and values seen so far."""

    def __init__(self, block: Any, adapters: Any, batch: int, slots: int) -> None:
        weight, out = block.fused_attn_ff_proj.weight, block.attn_out.weight
        if adapters is not None:
            q, k, v, o = (adapter.weight for adapter in adapters)
            added = torch.cat([q, k, v], dim=1).T
            weight = torch.cat([weight[: len(added)] + added, weight[len(added) :]])
            out = out + o.T
        self.block, self.weight, self.out = block, weight, out
        self.positions, self.scale = block.rotary_emb(slots, device=weight.device)
        shape = (batch, 1, slots, block.fused_dims[1])
        self.keys, self.values = weight.new_empty(shape), weight.new_empty(shape)

    def forward(self, x: Tensor, seen: int, rotate: Callable[..., Tensor]) -> Tensor:
        """x [B, n, E] at positions `seen` and after -> what the block adds to it."""
        from rlhf_kernels import decode_attention

        block, end = self.block, seen + x.shape[1]
        q, k, v, ff = F.linear(block.norm(x), self.weight).split(block.fused_dims, dim=-1)
        q = q.unflatten(-1, (block.heads, -1)).transpose(1, 2)
        if block.qk_rmsnorm:
            q, k = F.normalize(q, dim=-1) * block.q_scale, F.normalize(k, dim=-1) * block.k_scale
        positions = self.positions[seen:end]
        scale = self.scale[seen:end] if self.scale.dim() > 1 else self.scale
        q, k = rotate(positions, q, scale), rotate(positions, k, scale**-1)
        self.keys[:, 0, seen:end], self.values[:, 0, seen:end] = k, v
        if seen:
            seen_keys, seen_values = self.keys[:, :, :end], self.values[:, :, :end]
            attended = decode_attention(q.contiguous(), seen_keys, seen_values)
        else:
            attended = block.attend(q, k, v)
        attended = attended.transpose(1, 2).flatten(2)
        return F.linear(attended, self.out) + block.ff_out(ff)


def _known(model: Any, options: dict[str, Any]) -> bool:
    """Whether the cache can say this call: a causal model and no more than the choice of adapters."""
    return model.causal and options.keys() <= {"finetune_scope", "disable_lora"}


def _layers(
    model: Any, batch: int, slots: int, scope: str | None, disable_lora: bool = False
) -> list[_Layer]:
    adapters = [None] * len(model.layers)
    if scope is not None and not disable_lora:
        assert scope in model.finetune_modules
        adapters = list(model.finetune_modules[scope])
    return [_Layer(layer.fn, one, batch, slots) for layer, one in zip(model.layers, adapters)]


def cached_generate(original: Any) -> Any:
    """`PaLM.generate` by a cache; calls that it does not know go to the original."""
    from palm_rlhf_pytorch import palm

    def generate(
        self: Any,
        seq_len: int,
        prompt: Tensor | None = None,
        temperature: float = 1.0,
        filter_logits_fn: Any = palm.top_k,
        filter_thres: float = 0.9,
        pad_value: float = 0.0,
        eos_token: int | None = None,
        return_seq_without_prompt: bool = True,
        use_tqdm: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        if not _known(self, kwargs):
            return original(
                self, seq_len, prompt, temperature, filter_logits_fn, filter_thres, pad_value, eos_token,
                return_seq_without_prompt, use_tqdm, **kwargs,
            )  # fmt: skip
        if prompt is None:
            prompt = torch.randint(0, self.num_tokens, (1, 1)).to(self.device)
            return_seq_without_prompt = False

        def choose(logits: Tensor) -> Tensor:
            if filter_logits_fn is not None:
                logits = filter_logits_fn(logits, thres=filter_thres)
            return palm.gumbel_sample(logits, temperature=temperature, dim=-1)

        leading, start = prompt.shape[:-1], prompt.shape[-1]
        steps = range(max(1, seq_len - start))
        flat = prompt.reshape(-1, start)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                out = _sample(
                    self, flat, palm.tqdm(steps) if use_tqdm else steps, start + len(steps), choose,
                    eos_token, pad_value, kwargs, palm.apply_rotary_pos_emb,
                )  # fmt: skip
        finally:
            self.train(training)
        out = out.reshape(*leading, -1)
        return out[..., start:] if return_seq_without_prompt else out

    return generate


def _sample(
    model: Any, out: Tensor, steps: Any, slots: int, choose: Callable[[Tensor], Tensor], eos: int | None,
    pad: float, options: dict[str, Any], rotate: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """out [B, n] with the sampled tokens behind it; stops where every row, prompt included, has had `eos`."""
    layers = _layers(
        model, len(out), slots, options.get("finetune_scope"), options.get("disable_lora", False)
    )
    seen, ids = 0, out
    for _ in steps:
        x = model.token_emb(ids)
        for layer in layers:
            x = x + layer.forward(x, seen, rotate)
        seen += ids.shape[1]
        ids = choose(model.to_logits(model.norm(x[:, -1])))[:, None]
        out = torch.cat([out, ids], dim=1)
        if eos is not None:
            ended = out == eos
            if ended.any(dim=-1).all():
                return out.masked_fill(F.pad(ended, (1, -1)).cumsum(dim=-1) >= 1, pad)
    return out
