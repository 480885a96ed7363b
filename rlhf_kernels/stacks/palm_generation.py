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
    """One block with its adapters merged, and the keys and values seen so far.

    It holds the block's weights as two: those of the way in transposed, which MKL reads for one row in two
    thirds of the time, and those of both ways out as one. With one row the reading takes most of the time,
    and the number of operators the rest: queries and keys are turned together, as the heads of one tensor.
    """

    def __init__(self, block: Any, adapters: Any, batch: int, slots: int) -> None:
        weight, out = block.fused_attn_ff_proj.weight, block.attn_out.weight
        if adapters is not None:
            q, k, v, o = (adapter.weight for adapter in adapters)
            added = torch.cat([q, k, v], dim=1).T
            weight = torch.cat([weight[: len(added)] + added, weight[len(added) :]])
            out = out + o.T
        self.attend, self.heads = block.attend, block.heads
        self.gamma, self.beta = block.norm.gamma + 1, block.norm.beta
        self.weight = weight.t().contiguous()
        self.out = torch.cat([out, block.ff_out[-1].weight], dim=1)
        queries, size, _, gated = block.fused_dims
        self.parts = (queries + size, size, gated)
        self.scales = self._of_heads(block.q_scale, block.k_scale) if block.qk_rmsnorm else None
        self.cos, self.sin = self._tables(*block.rotary_emb(slots, device=weight.device))
        self.keys, self.values = weight.new_empty(2, batch, 1, slots, size)

    def _of_heads(self, query: Tensor, key: Tensor) -> Tensor:
        """[..., D] of queries and of keys as [..., H + 1, D]."""
        return torch.stack([query] * self.heads + [key], dim=-2)

    def _tables(self, angles: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [slots, H + 1, D], scaled, the sine of the first half negative: see `forward`."""
        cos, sin = angles.cos(), angles.sin()
        sin[:, : sin.shape[-1] // 2].neg_()
        cos, sin = (self._of_heads(table * scale, table * scale**-1) for table in (cos, sin))
        return cos, sin

    def forward(self, x: Tensor, seen: int) -> Tensor:
        """x [B, n, E] at positions `seen` and after -> what the block adds to it."""
        from rlhf_kernels import decode_attention, swiglu

        heads, end = self.heads, seen + x.shape[1]
        normed = F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)
        qk, v, ff = (normed @ self.weight).split(self.parts, dim=-1)
        qk = qk.unflatten(-1, (heads + 1, -1))
        if self.scales is not None:
            qk = F.normalize(qk, dim=-1) * self.scales
        other = qk.roll(qk.shape[-1] // 2, -1)  # the other half of each pair
        qk = torch.addcmul(qk * self.cos[seen:end], other, self.sin[seen:end])
        q, k = qk[:, :, :heads].transpose(1, 2), qk[:, :, heads]
        self.keys[:, 0, seen:end], self.values[:, 0, seen:end] = k, v
        if seen:
            attended = decode_attention(q, self.keys[:, :, :end], self.values[:, :, :end])
        else:
            attended = self.attend(q, k, v)
        return F.linear(torch.cat([attended.transpose(1, 2).flatten(2), swiglu(ff)], dim=-1), self.out)


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
                    eos_token, pad_value, kwargs,
                )  # fmt: skip
        finally:
            self.train(training)
        out = out.reshape(*leading, -1)
        return out[..., start:] if return_seq_without_prompt else out

    return generate


def _sample(
    model: Any, out: Tensor, steps: Any, slots: int, choose: Callable[[Tensor], Tensor], eos: int | None,
    pad: float, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """out [B, n] with the sampled tokens behind it; stops where every row, prompt included, has had `eos`."""
    layers = _layers(
        model, len(out), slots, options.get("finetune_scope"), options.get("disable_lora", False)
    )
    seen, ids = 0, out
    for _ in steps:
        x = model.token_emb(ids)
        for layer in layers:
            x = x + layer.forward(x, seen)
        seen += ids.shape[1]
        ids = choose(model.to_logits(model.norm(x[:, -1])))[:, None]
        out = torch.cat([out, ids], dim=1)
        if eos is not None:
            ended = out == eos
            if ended.any(dim=-1).all():
                return out.masked_fill(F.pad(ended, (1, -1)).cumsum(dim=-1) >= 1, pad)
    return out
