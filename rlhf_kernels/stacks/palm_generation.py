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

from rlhf_kernels.runtime.linear import Held


class _Layer:
    """One block with its adapters merged, and the keys and values seen so far.

    It holds the block's weights as two, both ways out as one, in the layout that few rows read fast. With one
    row the reading takes most of the time, and the number of operators the rest: queries and keys are turned
    together, as the heads of one tensor, their halves side by side so that a turn is a complex product.
    """

    def __init__(self, block: Any, adapters: Any, batch: int, slots: int) -> None:
        weight, out = block.fused_attn_ff_proj.weight, block.attn_out.weight
        queries, size, _, gated = block.fused_dims
        self.attend, self.heads = block.attend, block.heads
        self.gamma, self.beta = block.norm.gamma + 1, block.norm.beta
        self.parts = (queries + size, size, gated)
        qk, v, ff = weight.split(self.parts)
        if adapters is not None:
            q, k, value, o = (adapter.weight.T for adapter in adapters)
            qk, v, out = qk + torch.cat([q, k]), v + value, out + o
        pairs = qk.view(-1, 2, size // 2, qk.shape[-1]).transpose(1, 2).reshape(qk.shape)
        self.way_in = Held(torch.cat([pairs, v, ff]), batch)
        self.way_out = Held(torch.cat([out, block.ff_out[-1].weight], dim=1), batch)
        self.scales = None
        if block.qk_rmsnorm:
            scales = torch.stack([block.q_scale] * self.heads + [block.k_scale])
            self.scales = scales.view(-1, 2, size // 2).transpose(1, 2).reshape(scales.shape)
        self.narrow = weight.dtype.itemsize < 4
        self.turns = self._turns(*block.rotary_emb(slots, device=weight.device))
        self.keys, self.values = weight.new_empty(2, batch, 1, slots, size)

    def _turns(self, angles: Tensor, scale: Tensor) -> Tensor:
        """[slots, H + 1, D / 2]: what queries and keys at a position are multiplied by, complex."""
        half = angles.shape[-1] // 2
        wide = torch.promote_types(angles.dtype, torch.float32)  # there are no narrower complex numbers
        angles, scale = angles[:, :half].to(wide), scale[..., :half].to(wide)
        query, key = (torch.polar(by.expand_as(angles), angles) for by in (scale, scale**-1))
        return torch.stack([query] * self.heads + [key], dim=1)

    def forward(self, x: Tensor, seen: int) -> Tensor:
        """x [B, n, E] at positions `seen` and after -> what the block adds to it."""
        from rlhf_kernels import decode_attention, swiglu

        heads, end = self.heads, seen + x.shape[1]
        normed = F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)
        qk, v, ff = self.way_in(normed).split(self.parts, dim=-1)
        if self.scales is not None:
            qk = F.normalize(qk.unflatten(-1, (heads + 1, -1)), dim=-1) * self.scales
        pairs = qk.reshape(*x.shape[:2], heads + 1, -1, 2)
        turned = torch.view_as_complex(pairs.float() if self.narrow else pairs) * self.turns[seen:end]
        q, k = torch.view_as_real(turned).flatten(-2).split((heads, 1), dim=2)
        q, k = (q.to(x.dtype) if self.narrow else q).transpose(1, 2), k.squeeze(2)
        self.keys[:, 0, seen:end], self.values[:, 0, seen:end] = k, v
        if seen:
            attended = decode_attention(q, self.keys[:, :, :end], self.values[:, :, :end])
        else:
            attended = self.attend(q, k.to(x.dtype), v)
        return self.way_out(torch.cat([attended.transpose(1, 2).flatten(2), swiglu(ff)], dim=-1))


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


def cached_generate(original: Any, keep: Callable[[Tensor, Tensor], None] | None = None) -> Any:
    """`PaLM.generate` by a cache; calls that it does not know go to the original.

    `keep` is told the tokens [B, T] that the cache was made of, before any padding behind `eos_token`, and
    the logits [B, T, V] at them, which then are computed for the prompt and the last token too.
    """
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
                model = _Cached(self, len(flat), start + len(steps), kwargs)
                out = model.sample(flat, palm.tqdm(steps) if use_tqdm else steps, choose, eos_token, keep)
        finally:
            self.train(training)
        if eos_token is not None:
            ended = out == eos_token
            if ended.any(dim=-1).all():
                out = out.masked_fill(F.pad(ended, (1, -1)).cumsum(dim=-1) >= 1, pad_value)
        out = out.reshape(*leading, -1)
        return out[..., start:] if return_seq_without_prompt else out

    return generate


class _Cached:
    """A model and the cache of one generation."""

    def __init__(self, model: Any, batch: int, slots: int, options: dict[str, Any]) -> None:
        scope, plain = options.get("finetune_scope"), options.get("disable_lora", False)
        self.model, self.layers, self.seen = model, _layers(model, batch, slots, scope, plain), 0

    def logits(self, ids: Tensor, every: bool = False) -> Tensor:
        """Behind the tokens [B, n] that follow those seen: [B, V] of the last, or [B, n, V] of each."""
        x = self.model.token_emb(ids)
        for layer in self.layers:
            x = x + layer.forward(x, self.seen)
        self.seen += ids.shape[1]
        return self.model.to_logits(self.model.norm(x if every else x[:, -1]))

    def sample(
        self, out: Tensor, steps: Any, choose: Callable[[Tensor], Tensor], eos: int | None, keep: Any
    ) -> Tensor:
        """out [B, n] with the sampled tokens behind it; stops where every row, prompt included, has `eos`."""
        ids, kept = out, []
        for _ in steps:
            logits = self.logits(ids, every=keep is not None)
            if keep is not None:
                kept.append(logits)
                logits = logits[:, -1].clone()  # whatever chooses may write to it
            ids = choose(logits)[:, None]
            out = torch.cat([out, ids], dim=1)
            if eos is not None and (out == eos).any(dim=-1).all():
                break
        if keep is not None:
            keep(out, torch.cat([*kept, self.logits(ids, every=True)], dim=1))
        return out
