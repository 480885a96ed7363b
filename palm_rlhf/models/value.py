"""A scalar for each token or sequence: value models, and what reward models share with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palm_rlhf.algorithms.critics import bin_centres
from palm_rlhf.algorithms.preferences import expected_value
from palm_rlhf.models.finetune import learned, learned_dtype
from palm_rlhf.models.packing import hidden_rows, placed
from palm_rlhf.models.protocol import CausalModel
from palm_rlhf.padding import side_by_side
from rlhf_kernels import linear_logprob

# Logits that are held at a time where only a few of each row are wanted.
_LOGITS = 2**22


class ValueModel(nn.Module):
    """`head(hidden)` at every token, on a backbone that others may share.

    With a `scope` the backbone stays as it is and its adapters learn: actor, reference and critic are then
    one set of weights. Without, the whole backbone learns, and must be the critic's own.
    """

    def __init__(
        self,
        model: CausalModel,
        scope: str | None = None,
        *,
        bins: int = 0,
        low: float = -1.0,
        high: float = 1.0,
        last_layers: int | None = None,
    ) -> None:
        """The head starts at 0 (Huang et al., 2024: every value is 0 before the first update).

        Without a scope, `last_layers` says how many of the backbone's last layers learn beside the head.
        With `bins` a value is the mean of a distribution over as many equal parts of [low, high], and starts
        in the middle of them; ValueError for a single bin, or an empty range.
        """
        super().__init__()
        self.model, self.scope, self.last_layers = model, scope, last_layers
        # Whether padding is left out of the computation: see packing.set_packed().
        self.packed: bool | None = None
        weight = model.head.weight
        if bins and not (bins > 1 and low < high):
            raise ValueError(
                f"a critic needs at least 2 bins and low < high, got {bins} from {low} to {high}"
            )
        like = {"device": weight.device, "dtype": learned_dtype(weight)}
        centres = bin_centres(low, high, bins).to(**like) if bins else None
        self.register_buffer("centres", centres, persistent=False)
        self.value_head = nn.Linear(model.dim, bins or 1, **like)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T]: the value of the text up to and including each token: of the state before the next."""
        return self.scored(tokens, mask)[0]

    def scored(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The same, and the logits [B, T, bins] that the values are the means of, where there are bins."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        rows = hidden_rows(self.model, tokens, mask, mask, scope=self.scope, packed=self.packed)
        with torch.autocast(rows.device.type, enabled=False):  # a number wants all its digits
            found = placed(self.value_head(rows.to(self.value_head.weight.dtype)), mask)
        if self.centres is None:
            return found.squeeze(-1), None
        return expected_value(found, self.centres), found

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        yield from self.value_head.parameters()
        yield from learned(self.model, self.scope, self.last_layers)


class Policy(nn.Module):
    """A model with one scope's adapters, or without any: what is trained, sampled from, or referred to."""

    def __init__(self, model: CausalModel, scope: str | None = None, last_layers: int | None = None) -> None:
        """Without a scope all of the model learns, or so many of its last layers."""
        super().__init__()
        self.model, self.scope, self.last_layers = model, scope, last_layers
        # Whether padding is left out of the computation: see packing.set_packed().
        self.packed: bool | None = None

    def forward(
        self, tokens: Tensor, mask: Tensor | None, prompt_width: int, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy [B, R] of the tokens after the first `prompt_width`; 0 where masked."""
        hidden, real = self._hidden(tokens, mask, prompt_width)
        return self._scored(hidden, tokens, real, temperature)

    def response_logprob(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        pad: int = 0,
        temperature: float = 1.0,
    ) -> Tensor:
        """[B]: log-probability of each response after its prompt, summed over its tokens."""
        tokens, mask, width = side_by_side(prompts, responses, pad)
        device = self.model.device
        return self(tokens.to(device), mask.to(device), width, temperature)[0].sum(1)

    def with_head(
        self, tokens: Tensor, mask: Tensor | None, prompt_width: int, temperature: float, ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the log-probabilities [B, R, K] of other tokens `ids` at each place."""
        hidden, real = self._hidden(tokens, mask, prompt_width)
        # In blocks whose logits are made again in the backward: [N, V] never exists.
        blocks = zip(*(x.split(self._block) for x in (hidden, ids[real])))
        found = [checkpoint(self._picked, *block, temperature, use_reentrant=False) for block in blocks]
        return *self._scored(hidden, tokens, real, temperature), placed(torch.cat(found), real)

    @torch.no_grad()
    def most_probable(
        self, tokens: Tensor, mask: Tensor | None, prompt_width: int, temperature: float, count: int
    ) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [B, R, K] of the `count` most probable tokens, at most all but one."""
        hidden, real = self._hidden(tokens, mask, prompt_width)
        count = min(count, self.model.num_tokens - 1)
        found = [
            self._logits(block, temperature).log_softmax(-1).topk(count)
            for block in hidden.split(self._block)
        ]
        logprob, ids = (placed(torch.cat(parts), real) for parts in zip(*found))
        return ids, logprob

    @torch.no_grad()
    def divergence(
        self,
        reference: Policy,
        tokens: Tensor,
        mask: Tensor | None,
        prompt_width: int,
        temperature: float = 1.0,
    ) -> Tensor:
        """[B, R]: KL(this || reference) of the next token, over the whole vocabulary; 0 where masked."""
        both, found = (self, reference), []
        (mine, real), (theirs, _) = (policy._hidden(tokens, mask, prompt_width) for policy in both)
        for block in zip(mine.split(self._block), theirs.split(self._block)):
            p, q = (policy._logits(rows, temperature).log_softmax(-1) for policy, rows in zip(both, block))
            found.append((p.exp() * (p - q)).sum(-1))
        return placed(torch.cat(found), real)

    def _picked(self, hidden: Tensor, ids: Tensor, temperature: float) -> Tensor:
        """Log-probabilities [N, K] of the tokens `ids`."""
        return self._logits(hidden, temperature).log_softmax(-1).gather(1, ids)

    @property
    def _block(self) -> int:
        """Rows whose logits are held at a time."""
        return max(1, _LOGITS // self.model.num_tokens)

    def _logits(self, hidden: Tensor, temperature: float) -> Tensor:
        softcap = self.model.head.softcap
        weight, bias = (None if x is None else x.to(hidden.dtype) for x in self.model.head[:2])
        # As in sampling and in `_scored`: logits of 16 bits would move a log-probability by more than an
        # update does.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = nn.functional.linear(hidden, weight, bias)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.float() / temperature if logits.dtype != torch.float64 else logits / temperature

    def _hidden(self, tokens: Tensor, mask: Tensor | None, prompt_width: int) -> tuple[Tensor, Tensor]:
        """[n, E], from which each real token of the responses was drawn; and where those are, [B, R]."""
        mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        real = mask[:, prompt_width:]
        wanted = nn.functional.pad(real, (prompt_width - 1, 0))
        # Nothing follows the last token of a row.
        read = mask[:, :-1] & (mask.cumsum(1)[:, :-1] < mask.sum(1, keepdim=True))
        rows = hidden_rows(self.model, tokens[:, :-1], read, wanted, scope=self.scope, packed=self.packed)
        return rows, real

    def _scored(
        self, hidden: Tensor, tokens: Tensor, real: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        head = self.model.head
        # Under autocast the hidden states have another dtype.
        weight, bias = (None if x is None else x.to(hidden.dtype) for x in head[:2])
        target = tokens[:, tokens.shape[1] - real.shape[1] :][real]
        found = linear_logprob(
            hidden, weight, target, bias=bias, temperature=temperature, softcap=head.softcap
        )
        return tuple(placed(x, real) for x in found)

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that learn."""
        yield from learned(self.model, self.scope, self.last_layers)

    def of(self, model: CausalModel) -> Policy:
        """The same of another model with such adapters."""
        return Policy(model, self.scope, self.last_layers)


def frozen(model: nn.Module) -> nn.Module:
    """The same module in evaluation mode, its parameters without gradients."""
    model.eval()
    return model.requires_grad_(False)


def set_dropout(dropout: float, *models: nn.Module) -> None:
    """Dropout of PaLM and of PyTorch's own modules, wherever they are in these."""
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
            if hasattr(module, "set_dropout"):
                module.set_dropout(dropout)
