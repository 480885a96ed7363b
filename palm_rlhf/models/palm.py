"""PaLM (Chowdhery et al., 2022, arXiv:2204.02311) with palm-rlhf-pytorch's arguments, on rlhf_kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf.models.block import Block, Context
from palm_rlhf.models.cache import KVCache
from palm_rlhf.models.finetune import Targets, chosen, last_blocks, learned_dtype
from palm_rlhf.models.lora import PROJECTIONS, BlockLoRA
from palm_rlhf.models.packing import Packing
from palm_rlhf.models.protocol import IGNORED, Head
from rlhf_kernels import RotaryTable, RotaryTables, layer_norm, linear_logprob, rotary_tables
from rlhf_kernels.runtime.checks import readable

# Tokens over rotary_xpos_scale_base: beyond, the factors of xPos leave float32's range (0.2857^-64 = 7e34).
_XPOS_REACH = 128


@dataclass(frozen=True)
class PaLMConfig:
    """What a PaLM is made of: the constructor's arguments that a checkpoint has to keep."""

    dim: int
    num_tokens: int
    depth: int
    causal: bool = True
    dim_head: int = 64
    heads: int = 8
    ff_mult: int = 4
    qk_rmsnorm: bool = False
    rotary_xpos_scale_base: int = 512
    cross_entropy_ignore_index: int = IGNORED
    compat: bool = False


class PaLM(nn.Module):
    """Parallel attention and SwiGLU blocks, one key/value head, xPos rotary embeddings, tied embeddings.

    Where palm-rlhf-pytorch 0.8.0 is wrong this is not, and differs:

    - a mask, and negative token ids, hide tokens from a causal model as well: theirs ignores padding;
    - `cross_entropy_ignore_index` is -100: theirs is 0, which leaves a real token untrained;
    - under `qk_rmsnorm` scores are multiplied by `qk_scale` (8): theirs never are; `compat=True` repeats it;
    - positions are exact in every dtype: theirs collapse in bfloat16;
    - `set_dropout` reaches the attention; LoRA starts small and its product is not formed in training;
    - `flash_attn` is accepted and does nothing: attention never holds the scores, on any device.
    """

    # Rotary embeddings see distances only. What xPos cannot reach (65,536 tokens by default) is refused.
    max_length: int | None = None

    def __init__(
        self,
        *,
        dim: int,
        num_tokens: int,
        depth: int,
        causal: bool = True,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        qk_rmsnorm: bool = False,
        lora_r: int = 8,
        rotary_xpos_scale_base: int = 512,
        flash_attn: bool = False,
        finetune_scopes: Iterable[str] = (),
        cross_entropy_ignore_index: int = IGNORED,
        compat: bool = False,
    ) -> None:
        """
        Args:
            dim: width E. num_tokens: vocabulary V. depth: number of blocks.
            causal: False makes an encoder, with rotary embeddings but without xPos.
            dim_head: size of a head, even. heads: query heads; there is one key/value head.
            ff_mult: inner width of the feed-forward over dim.
            attn_dropout, ff_dropout: of attention weights and of the inner feed-forward, in training.
            qk_rmsnorm: normalise queries and keys, with learned scales.
            lora_r: rank of adapters that are added without one of their own.
            rotary_xpos_scale_base: distance in tokens over which xPos decays.
            flash_attn: as above.
            finetune_scopes: adapters to begin with.
            cross_entropy_ignore_index: the label that `return_loss` leaves out.
            compat: repeat palm-rlhf-pytorch's missing qk_scale.

        Raises:
            ValueError: a size is below 1, or dim_head is odd.
        """
        super().__init__()
        sizes = {"dim": dim, "num_tokens": num_tokens, "depth": depth}
        sizes |= {"dim_head": dim_head, "heads": heads, "ff_mult": ff_mult}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"PaLM: {name} must be at least 1, got {size}")
        if dim_head % 2:
            raise ValueError(
                f"PaLM: dim_head must be even, since rotary embeddings turn pairs, got {dim_head}"
            )
        self.config = PaLMConfig(
            **sizes,
            causal=causal,
            qk_rmsnorm=qk_rmsnorm,
            rotary_xpos_scale_base=rotary_xpos_scale_base,
            cross_entropy_ignore_index=cross_entropy_ignore_index,
            compat=compat,
        )
        self.dim, self.num_tokens, self.causal, self.lora_r = dim, num_tokens, causal, lora_r
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.layers = nn.ModuleList(Block(self.config, attn_dropout, ff_dropout) for _ in range(depth))
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.finetune_modules = nn.ModuleDict()
        for scope in finetune_scopes:
            self.add_finetune_params(scope)
        self._rotary: dict[tuple[int, torch.device], RotaryTables] = {}

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.token_emb.weight.device

    @property
    def head(self) -> Head:
        """The tied embedding."""
        return Head(self.token_emb.weight)

    def forward(
        self,
        x: Tensor,
        return_loss: bool = False,
        disable_lora: bool = False,
        finetune_scope: str | None = None,
        extra_embed: Tensor | None = None,
        return_only_embedding: bool = False,
        return_logits_with_embedding: bool = False,
        *,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V] of tokens x [B, T]; or what the options ask for.

        Args:
            x: token ids; negative ones are padding.
            return_loss: the mean negative log-probability of x[:, 1:] instead, over real tokens that follow
                a real one; the logits are never held.
            disable_lora: leave the adapters of `finetune_scope` out.
            finetune_scope: adapters to use.
            extra_embed: added to the embeddings, [B, T, E] or what broadcasts to it.
            return_only_embedding: the final hidden states [B, T, E] instead.
            return_logits_with_embedding: both.
            mask: [B, T] boolean, True where a token is real.

        Raises:
            ValueError: there are no such adapters, or the shape of x or mask is not [B, T].
        """
        if x.dim() != 2 or (mask is not None and mask.shape != x.shape):
            got = tuple(x.shape) if x.dim() != 2 else f"{tuple(x.shape)} with a mask {tuple(mask.shape)}"
            raise ValueError(f"PaLM: tokens and their mask must be [batch, time], got {got}")
        x, labels = (x[:, :-1], x[:, 1:]) if return_loss else (x, None)
        if return_loss:
            # The first token after padding follows nothing: padding on the left must not add it to the loss.
            labels = labels.masked_fill(x < 0, -1)
            if mask is not None:
                labels = labels.masked_fill(~(mask[:, 1:] & mask[:, :-1]), -1)
                mask = mask[:, :-1]
        negative = x < 0
        # Where nobody can look, a mask that hides nothing costs less than to wait for a GPU or break a graph.
        if not readable(x) or bool(negative.any()):
            mask = ~negative if mask is None else mask & ~negative
            x = x.masked_fill(negative, 0)
        scope = None if disable_lora else finetune_scope
        hidden = self.hidden_states(x, mask=mask, scope=scope, extra_embed=extra_embed)
        if return_loss:
            return self._loss(hidden, labels)
        if return_only_embedding:
            return hidden
        logits = F.linear(hidden, self.token_emb.weight)
        return (logits, hidden) if return_logits_with_embedding else logits

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        ignored = (labels == self.config.cross_entropy_ignore_index) | (labels < 0)
        target = labels.masked_fill(ignored, IGNORED).reshape(-1)
        weight = self.token_emb.weight.to(hidden.dtype)  # another one under autocast
        found, _ = linear_logprob(hidden.reshape(-1, self.dim), weight, target, ignore_index=IGNORED)
        return -found.sum() / (~ignored).sum().clamp(min=1)

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        scope: str | None = None,
        cache: KVCache | None = None,
        extra_embed: Tensor | None = None,
    ) -> Tensor:
        """[B, T, E] after the last norm: see `models.protocol.CausalModel`."""
        x = self.token_emb(tokens)
        if extra_embed is not None:
            x = x + extra_embed
        return self._through(x, self._context(tokens.shape[1], mask, cache), scope)

    @property
    def packs(self) -> bool:
        """Packed sequences have no dropout of the attention."""
        return not (self.training and any(block.attn_dropout for block in self.layers))

    def packed_hidden_states(self, tokens: Tensor, packing: Packing, *, scope: str | None = None) -> Tensor:
        """[N, E]: see `models.packing.PackedModel`; ValueError where there is dropout of the attention."""
        tables = (
            RotaryTable(table.cos[packing.positions], table.sin[packing.positions])
            for table in self._tables(packing.longest)
        )
        context = Context(RotaryTables(*tables), cu_seqlens=packing.cu_seqlens)
        return self._through(self.token_emb(tokens)[None], context, scope)[0]

    def _through(self, x: Tensor, context: Context, scope: str | None) -> Tensor:
        """[B, T, E] of embeddings x: the blocks and the last norm."""
        loras = self._scope(scope) if scope is not None else (None,) * len(self.layers)
        for index, (block, lora) in enumerate(zip(self.layers, loras)):
            x = block(x, context, lora, index)
        return layer_norm(x, self.gamma, weight_offset=1.0)

    def _context(self, steps: int, mask: Tensor | None, cache: KVCache | None) -> Context:
        if cache is None:
            return Context(self._tables(steps), mask)
        slots = cache.extend(steps, mask)
        return Context(cache.tables(slots), cache.key_mask, cache, slots)

    def _tables(self, steps: int) -> RotaryTables:
        """Tables for so many slots, by a size that depends on nothing that went before."""
        size = max(64, 1 << (steps - 1).bit_length() if steps else 0)
        key = (size, self.device)
        if key not in self._rotary:
            # xPos scales by 1 in the middle, which keeps the factors small; the centre cancels in q k^T.
            base = self.config.rotary_xpos_scale_base if self.causal else None
            if base is not None and size > _XPOS_REACH * base:
                raise ValueError(
                    f"PaLM: {steps} tokens are too many for rotary_xpos_scale_base={base}: xPos overflows. "
                    f"Cut the sequences to {_XPOS_REACH * base} tokens, or train with a larger base."
                )
            # Kept for later calls, which may need gradients: a tensor of inference mode never can.
            with torch.inference_mode(False):
                positions = torch.arange(size, device=self.device)
                tables = rotary_tables(
                    positions, self.config.dim_head, xpos_scale_base=base, xpos_center=size // 2
                )
            self._rotary[key] = tables
        query, key_ = (RotaryTable(table.cos[:steps], table.sin[:steps]) for table in self._rotary[key])
        return RotaryTables(query, key_)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        if not self.causal:
            raise ValueError("PaLM: only a causal model generates, and this one has causal=False")
        weight = self.token_emb.weight
        shape, kind = (batch, 1, capacity, self.config.dim_head), weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return KVCache(len(self.layers), shape, self._tables(capacity), dtype=dtype, device=weight.device)

    @torch.no_grad()
    def for_sampling(self, scope: str | None = None) -> PaLM:
        """This model in evaluation mode with one scope's adapters merged; the other weights are shared."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        loras = self._scope(scope) if scope is not None else (None,) * len(self.layers)
        twin.layers = nn.ModuleList(block.merged(lora) for block, lora in zip(self.layers, loras))
        # Not eval(): modules that are shared keep the mode that they are in.
        twin.training = False
        return twin

    def set_dropout(self, dropout: float) -> PaLM:
        """Dropout of attention and feed-forward alike."""
        for block in self.layers:
            block.attn_dropout = block.ff_dropout = dropout
        return self

    @property
    def scopes(self) -> tuple[str, ...]:
        """The names of its adapters."""
        return tuple(self.finetune_modules)

    def _scope(self, scope: str) -> nn.ModuleList:
        if scope not in self.finetune_modules:
            there = ", ".join(map(repr, self.finetune_modules)) or "none"
            raise ValueError(
                f"PaLM: there are no adapters {scope!r}, only {there}. Add them with add_finetune_params()."
            )
        return self.finetune_modules[scope]

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, the first one first."""
        return list(self.layers)

    def add_finetune_params(
        self,
        scope: str,
        lora_r: int | None = None,
        targets: Targets = "attention",
        last_layers: int | None = None,
        alpha: float | None = None,
    ) -> None:
        """Adds adapters that change nothing yet; beside weights in 16 bits they are float32.

        Args:
            scope: their name. lora_r: their rank; the model's own by default.
            targets: the projections that get one: "attention", "mlp", "all", or names of
                `lora.PROJECTIONS`.
            last_layers: only in so many of the last layers.
            alpha: what they add is scaled by alpha over the rank; by default by 1.

        Raises:
            ValueError: the scope exists, or there are no such projections or layers.
        """
        if scope in self.finetune_modules:
            raise ValueError(f"PaLM: there are adapters {scope!r} already. Remove or merge them first.")
        weight, rank = self.token_emb.weight, self.lora_r if lora_r is None else lora_r
        names = chosen(PROJECTIONS, targets, "PaLM")
        deep = {id(block) for block in last_blocks(self, last_layers)}
        adapters = nn.ModuleList()
        for block in self.layers:
            sizes = block.projections()
            adapters.append(BlockLoRA({n: sizes[n] for n in names if id(block) in deep}, rank, alpha))
        self.finetune_modules[scope] = adapters.to(device=weight.device, dtype=learned_dtype(weight))

    def adapter_options(self, scope: str) -> dict[str, Any]:
        """The arguments of `add_finetune_params` that make adapters such as these."""
        there = [lora for lora in self._scope(scope) if lora.targets]
        first = next(iter(there[0]))
        rank = first.A.shape[1]
        last_layers = None if len(there) == len(self.layers) else len(there)
        found = {"lora_r": rank, "targets": there[0].targets, "last_layers": last_layers}
        return found | {"alpha": first.scale * rank}

    def remove_finetune_params(self, scope: str) -> nn.Module:
        """Takes adapters out and returns them."""
        self._scope(scope)
        return self.finetune_modules.pop(scope)

    @torch.no_grad()
    def merge_finetune_params(self, scope: str) -> None:
        """Adds adapters to the weights and removes them."""
        for block, lora in zip(self.layers, self.remove_finetune_params(scope)):
            block.merge_(lora)

    def palm_parameters(self) -> set[nn.Parameter]:
        """All parameters but the adapters'."""
        return set(self.parameters()) - set(self.finetune_modules.parameters())

    def finetune_parameters(self, scope: str = "default") -> Iterator[nn.Parameter]:
        """Those of one scope's adapters."""
        return self._scope(scope).parameters()

    def __deepcopy__(self, memo: dict[int, Any]) -> PaLM:
        """Without the tables, which the copy makes for itself."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        state = {
            name: copy.deepcopy(value, memo) for name, value in self.__dict__.items() if name != "_rotary"
        }
        twin.__dict__.update(state, _rotary={})
        return twin
