"""One block of PaLM: attention and feed-forward side by side, behind one norm."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf.models.cache import KVCache
from palm_rlhf.models.lora import BlockLoRA
from rlhf_kernels import (
    RotaryTables,
    attention,
    attention_varlen,
    decode_attention,
    layer_norm,
    rms_norm,
    rotary,
    swiglu,
)
from rlhf_kernels.runtime.linear import linear, pack, packed_linear

if TYPE_CHECKING:
    from palm_rlhf.models.palm import PaLMConfig

# Of queries and keys that are normalised to length 1.
QK_SCALE = 8.0
# In which weight a projection is.
_WEIGHT = dict.fromkeys(("q", "k", "v", "up", "gate"), "fused") | {"o": "attn_out", "down": "ff_out"}


class Context(NamedTuple):
    """What the blocks of one call share: tables, mask of the keys, and the cache with the slots to fill.

    Of packed sequences, which are one row, `cu_seqlens` say where each ends.
    """

    tables: RotaryTables
    key_mask: Tensor | None = None
    cache: KVCache | None = None
    slots: slice | None = None
    cu_seqlens: Tensor | None = None


class Block(nn.Module):
    """`x + attention(norm(x)) + swiglu(norm(x))`, without biases.

    Attributes:
        gamma: [E], the norm's weight less 1.
        fused: [H D + 2 D + 2 F, E]: queries, one key and one value head, and the feed-forward's two halves.
        attn_out: [E, H D].
        ff_out: [E, F].
    """

    def __init__(self, config: PaLMConfig, attn_dropout: float, ff_dropout: float) -> None:
        super().__init__()
        c = config
        self.heads, self.dim_head, self.causal = c.heads, c.dim_head, c.causal
        self.attn_dropout, self.ff_dropout = attn_dropout, ff_dropout
        inner, ff_inner = c.heads * c.dim_head, c.dim * c.ff_mult
        self.split = (inner + 2 * c.dim_head, ff_inner, ff_inner)
        self.heads_split = (inner, c.dim_head, c.dim_head)
        self.gamma = nn.Parameter(torch.zeros(c.dim))
        # 1 + gamma, made once where gamma is fixed. Beside it: a block for sampling may be saved.
        self.gain: Tensor | None = None
        self.packed: dict[str, Tensor] = {}
        self.fused = nn.Linear(c.dim, sum(self.split), bias=False)
        self.attn_out = nn.Linear(inner, c.dim, bias=False)
        self.ff_out = nn.Linear(ff_inner, c.dim, bias=False)
        self.normalized = c.qk_rmsnorm
        self.scale = QK_SCALE if c.qk_rmsnorm and not c.compat else c.dim_head**-0.5
        if c.qk_rmsnorm:
            self.q_scale = nn.Parameter(torch.ones(c.dim_head))
            self.k_scale = nn.Parameter(torch.ones(c.dim_head))

    def forward(self, x: Tensor, context: Context, lora: BlockLoRA | None = None, layer: int = 0) -> Tensor:
        """x [B, T, E] to the same, for the layer of that index in the context's cache."""
        gamma, offset = (self.gamma, 1.0) if self.gain is None else (self.gain, 0.0)
        normed = layer_norm(x, gamma, weight_offset=offset)
        if self.packed:
            qkv, inner, gate = packed_linear(normed, self.packed["fused"]).split(self.split, dim=-1)
            attended = packed_linear(self._attend(qkv, context, layer), self.packed["attn_out"])
            return x + attended + packed_linear(swiglu(inner, gate), self.packed["ff_out"])
        # Split weights, not results: the gradient of a split is a copy of the whole.
        qkv, inner, gate = (linear(normed, weight) for weight in self.fused.weight.split(self.split))
        if lora is not None:
            if any(lora[number] is not None for number in range(3)):
                qkv = torch.cat(lora.plus(0, normed, qkv.split(self.heads_split, dim=-1)), dim=-1)
            inner, gate = lora.plus(4, normed, (inner, gate))
        attended = self._attend(qkv, context, layer)
        inner = swiglu(inner, gate)
        if self.training and self.ff_dropout:
            inner = F.dropout(inner, self.ff_dropout)
        x = x + linear(attended, self.attn_out.weight)
        out = linear(inner, self.ff_out.weight)
        if lora is not None:
            (x,), (out,) = lora.plus(3, attended, (x,)), lora.plus(6, inner, (out,))
        return x + out

    def _attend(self, qkv: Tensor, context: Context, layer: int) -> Tensor:
        """[B, T, H D]: what each head reads."""
        batch, steps, _ = qkv.shape
        heads = qkv.unflatten(-1, (self.heads + 2, self.dim_head)).transpose(1, 2)
        q, k, v = heads.split((self.heads, 1, 1), dim=1)
        if self.normalized:
            q, k = self._unit(q, self.q_scale), self._unit(k, self.k_scale)
        dropout = self.training and self.attn_dropout
        if context.cu_seqlens is not None:
            return self._attend_packed(q, k, v, context)
        if context.cache is None and steps > 1 and not dropout:
            out = attention(
                q,
                k,
                v,
                causal=self.causal,
                key_mask=context.key_mask,
                scale=self.scale,
                rotary=context.tables,
            )
            return out.transpose(1, 2).reshape(batch, steps, self.heads * self.dim_head)
        q, k = rotary(q, context.tables.query), rotary(k, context.tables.key)
        if context.cache is not None:
            k, v = context.cache.append(layer, context.slots, k, v)
        if steps == 1:
            return self._attend_step(q, k, v, context).reshape(batch, 1, self.heads * self.dim_head)
        if dropout:
            out = self._with_dropout(q, k, v, context.key_mask)
        else:
            out = attention(q, k, v, causal=self.causal, key_mask=context.key_mask, scale=self.scale)
        return out.transpose(1, 2).reshape(batch, steps, self.heads * self.dim_head)

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """[1, N, H D]: what each head reads of the sequence that it is in."""
        if self.training and self.attn_dropout:
            raise ValueError("PaLM: packed sequences have no attention dropout. Turn it off: set_dropout(0)")
        rows = (x[0].transpose(0, 1) for x in (q, k, v))
        out = attention_varlen(
            *rows, context.cu_seqlens, causal=self.causal, scale=self.scale, rotary=context.tables
        )
        return out.view(1, *out.shape[:1], self.heads * self.dim_head)

    def _attend_step(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """What the heads of one step read, [B, H, 1, D] or with the middle dimensions exchanged."""
        cache = context.cache
        if cache is not None and cache.gapless and not (torch.is_grad_enabled() and q.requires_grad):
            return decode_attention(q, k, v, starts=cache.starts, scale=self.scale)
        # All heads of one step read the same keys: they are the queries of one head.
        return attention(q.transpose(1, 2), k, v, key_mask=context.key_mask, scale=self.scale)

    def _unit(self, x: Tensor, weight: Tensor) -> Tensor:
        """x / |x| * weight, by the norm that divides by |x| / sqrt(D)."""
        return rms_norm(x, weight * self.dim_head**-0.5, eps=1e-26)

    def _with_dropout(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """PyTorch's own attention, since the kernel has no dropout; a row that sees nothing is cleared."""
        see = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        see = (see.tril(k.shape[2] - q.shape[2]) if self.causal else see)[None, None]
        if key_mask is not None:
            see = see & key_mask[:, None, None]
        empty = ~see.any(-1, keepdim=True)
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=see | empty, dropout_p=self.attn_dropout, scale=self.scale
        )
        return out.masked_fill(empty, 0)

    def projections(self) -> dict[str, tuple[int, int]]:
        """Input and output widths of every projection; see `lora.PROJECTIONS`."""
        (inner, key, value), dim, ff_inner = self.heads_split, len(self.gamma), self.split[1]
        attention = {"q": (dim, inner), "k": (dim, key), "v": (dim, value), "o": (inner, dim)}
        return attention | {"up": (dim, ff_inner), "gate": (dim, ff_inner), "down": (ff_inner, dim)}

    @torch.no_grad()
    def merge_(self, lora: BlockLoRA) -> None:
        """Adds the adapters to the weights."""
        for weight, added in (
            (self.fused.weight[: self.split[0]], lora.added(0, self.heads_split)),
            (self.fused.weight[self.split[0] :], lora.added(4, self.split[1:])),
            (self.attn_out.weight, lora.added(3, self.attn_out.weight.shape[:1])),
            (self.ff_out.weight, lora.added(6, self.ff_out.weight.shape[:1])),
        ):
            if added is not None:
                weight.add_(added)

    @torch.no_grad()
    def merged(self, lora: BlockLoRA | None) -> Block:
        """A block in evaluation mode with the adapters in its weights; the other weights are shared."""
        twin = copy.copy(self)
        twin.training, twin._modules = False, dict(self._modules)
        twin.gain = self.gamma.to(torch.promote_types(self.gamma.dtype, torch.float32)) + 1
        if lora is not None:
            touched = {_WEIGHT[name] for name in lora.targets}
            for name in sorted(touched):
                own = twin._modules[name] = copy.copy(self._modules[name])
                own._parameters = {"weight": nn.Parameter(own.weight.clone(), False), "bias": None}
            twin.merge_(lora)
        copies = {name: pack(twin._modules[name].weight) for name in ("fused", "attn_out", "ff_out")}
        twin.packed = {} if None in copies.values() else copies
        return twin
